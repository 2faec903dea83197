"""The benchmarks as data: one row each, and what to do when their files are not there.

A benchmark is a folder with two lists of `relative path,label` lines and the videos they name:

    DATA_ROOT/NAME/train.csv   DATA_ROOT/NAME/val.csv   DATA_ROOT/NAME/<videos>

Packed shards of the two lists may stand beside them as train/ and val/ (`python -m data_pipeline
pack`).
"""

import csv
import difflib
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Benchmark:
    """Number of classes, file names of the lists, and the command that makes them."""

    num_classes: int
    train_csv: str = "train_new.csv"
    val_csv: str = "val_new.csv"
    prepare: str = ""


_SSV2 = (
    "python -m eval_encoder.probe_prepare ssv2 --annotations DIR_OF_THE_JSON_FILES --videos "
    "DIR_OF_THE_WEBM_FILES "
    "--output {folder}"
)

BENCHMARKS = {
    "ssv2": Benchmark(174, "ssv2_train_new.csv", "ssv2_val_new.csv", _SSV2),
    "diving48": Benchmark(48, "diving48_train_new.csv", "diving48_val_new.csv"),
    "perception_test": Benchmark(63),
    "epic_verb": Benchmark(97),
    "epic_noun": Benchmark(300),
    "ucf101": Benchmark(101),
    "hmdb51": Benchmark(51),
    "k400": Benchmark(400),
    "k600": Benchmark(600),
    "k700": Benchmark(700),
    "k710": Benchmark(710),
    "charadesego": Benchmark(157),
    "motion_shapes": Benchmark(
        8, "train.csv", "val.csv", "python -m data_pipeline motion-shapes {folder}"
    ),
}


class MissingBenchmark(ValueError):
    """A benchmark whose files are not on disk; the message shows the expected
    tree and the command that makes it.
    """


@dataclass(frozen=True)
class LabelledList:
    """One split: names relative to `folder`, labels, and the packed shards beside the list,
    if any.
    """

    folder: Path
    split: str
    names: list[str]
    labels: list[int]

    @property
    def shards(self) -> Path | None:
        """Folder of packed shards of this split."""
        packed = self.folder / self.split
        return packed if (packed / "manifest.json").is_file() else None


def find_benchmark(name: str) -> Benchmark:
    """Row of a benchmark, case ignored; ValueError names the nearest known ones."""
    key = name.lower()
    if key not in BENCHMARKS:
        near = difflib.get_close_matches(key, BENCHMARKS, n=3, cutoff=0.3) or list(BENCHMARKS)
        raise ValueError(f"--dataset {name!r} is unknown; nearest known: {', '.join(near)}")
    return BENCHMARKS[key]


def read_lists(
    name: str, data_root: Path, train_csv: str | None, val_csv: str | None
) -> tuple[LabelledList, LabelledList]:
    """Training and validation list of a benchmark.

    Raises MissingBenchmark without the files, ValueError for a line that is no `path,label` or a
    label out of range.
    """
    benchmark = find_benchmark(name)
    folder = data_root / name.lower()
    files = (folder / (train_csv or benchmark.train_csv), folder / (val_csv or benchmark.val_csv))
    if not all(file.is_file() for file in files):
        raise MissingBenchmark(_instructions(name.lower(), benchmark, folder, files))
    return tuple(
        _read_list(file, folder, split, benchmark.num_classes)
        for file, split in zip(files, ("train", "val"), strict=True)
    )


def _read_list(file: Path, folder: Path, split: str, num_classes: int) -> LabelledList:
    names, labels = [], []
    with open(file, newline="", encoding="utf-8-sig") as lines:
        for number, row in enumerate(csv.reader(lines), start=1):
            if not row:
                continue
            if len(row) != 2 or not row[1].strip().isdigit() or int(row[1]) >= num_classes:
                raise ValueError(
                    f"{file} line {number}: {row} is no `relative path,label` with a label below "
                    f"{num_classes}"
                )
            names.append(row[0].strip())
            labels.append(int(row[1]))
    if not names:
        raise ValueError(f"{file} lists no video")
    return LabelledList(folder, split, names, labels)


def _instructions(name: str, benchmark: Benchmark, folder: Path, files) -> str:
    missing = ", ".join(str(file) for file in files if not file.is_file())
    tree = (
        f"  {folder}/\n    {files[0].name}      lines of `relative path,label`\n"
        f"    {files[1].name}\n    <the videos>"
    )
    prepare = benchmark.prepare.format(folder=folder)
    command = (
        f"make the lists with\n  {prepare}"
        if prepare
        else "write the two lists from the benchmark's own split files"
    )
    return (
        f"benchmark {name} is not on disk: {missing} is missing. Expected:\n{tree}\n{command}\n"
        f"or point --data_root at the folder that holds {name}/"
    )
