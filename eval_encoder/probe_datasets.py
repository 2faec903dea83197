"""The benchmarks as data: one row each, their lists, and what to do when files are not there.

A benchmark is a folder with two lists of `relative path,label` lines and the videos (or pictures)
they name. Several labels of a clip are separated by spaces, and it may have none:

    DATA_ROOT/NAME/train.csv   DATA_ROOT/NAME/val.csv   DATA_ROOT/NAME/<videos>

Any other folder of that form is judged with `--dataset PATH`, and so is one with train/CLASS/ and
val/CLASS/ folders of files. Packed shards of the two lists may stand beside them as train/ and val/
(`python -m data_pipeline pack`).
"""

import csv
import difflib
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.codec.open_video import is_image, is_video
from data_pipeline.counter_rng import counter_rng

PREPARE = "python -m eval_encoder.probe_prepare"


@dataclass(frozen=True)
class Benchmark:
    """Number of classes (0: read off the labels), file names of the lists, and the command that
    makes them."""

    num_classes: int
    train_csv: str = "train_new.csv"
    val_csv: str = "val_new.csv"
    prepare: str = ""


def _splits(name: str) -> str:
    return f"{PREPARE} {name} --splits DIR_OF_THE_SPLIT_LISTS --videos DIR --output {{folder}}"


_SSV2 = f"{PREPARE} ssv2 --annotations DIR_OF_THE_JSON_FILES --videos DIR --output {{folder}}"
_KINETICS = f"{PREPARE} kinetics --train TRAIN.csv --val VAL.csv --videos DIR --output {{folder}}"

BENCHMARKS = {
    "ssv2": Benchmark(174, "ssv2_train_new.csv", "ssv2_val_new.csv", _SSV2),
    "diving48": Benchmark(48, "diving48_train_new.csv", "diving48_val_new.csv"),
    "perception_test": Benchmark(63),
    "epic_verb": Benchmark(97),
    "epic_noun": Benchmark(300),
    "ucf101": Benchmark(101, prepare=_splits("ucf101")),
    "hmdb51": Benchmark(51, prepare=_splits("hmdb51")),
    "k400": Benchmark(400, prepare=_KINETICS),
    "k600": Benchmark(600, prepare=_KINETICS),
    "k700": Benchmark(700, prepare=_KINETICS),
    "k710": Benchmark(710),
    "charadesego": Benchmark(157),
    "charadesego_v1_only1st": Benchmark(157),
    "charadesego_v1_only3rd": Benchmark(157),
    "coin": Benchmark(150),
    "jester": Benchmark(27),
    "mit": Benchmark(339),
    "rareact": Benchmark(149),
    "drone_action": Benchmark(13),
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
    """One split: names relative to `folder`, labels int64 [N] or, where clips have several, 0/1
    uint8 [N, classes]; and the packed shards beside the list, if any.
    """

    folder: Path
    split: str
    names: list[str]
    labels: np.ndarray
    num_classes: int

    def __len__(self) -> int:
        return len(self.names)

    @property
    def is_multi_label(self) -> bool:
        """Whether a clip may have several labels."""
        return self.labels.ndim == 2

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
        raise ValueError(
            f"--dataset {name!r} is neither a folder nor a known benchmark; nearest known: "
            f"{', '.join(near)}"
        )
    return BENCHMARKS[key]


def read_lists(
    name: str,
    data_root: Path,
    train_csv: str | None = None,
    val_csv: str | None = None,
    num_classes: int = 0,
    protocol: str | None = None,
) -> tuple[LabelledList, LabelledList]:
    """Training and validation list of a benchmark, or of a folder.

    Raises MissingBenchmark without the files, ValueError for a line that is no `path,label`, a
    label out of range, or several labels under the single-label protocol.
    """
    if name.lower() in BENCHMARKS or not Path(name).is_dir():
        benchmark, folder = find_benchmark(name), data_root / name.lower()
    else:
        benchmark, folder = Benchmark(0, "train.csv", "val.csv"), Path(name)
    files = (folder / (train_csv or benchmark.train_csv), folder / (val_csv or benchmark.val_csv))
    if all(file.is_file() for file in files):
        rows = [_read_rows(file) for file in files]
    elif not (train_csv or val_csv) and _has_class_folders(folder, files):
        rows = _class_folders(folder)
    else:
        raise MissingBenchmark(_instructions(name, benchmark, folder, files))
    several = _is_multi_label(rows, protocol, name)
    if several:
        rows = [_merged(split) for split in rows]
    largest = max((i for split in rows for _, _, labels in split for i in labels), default=0)
    classes = num_classes or benchmark.num_classes or largest + 1
    return tuple(
        _labelled(folder, split, found, classes, several)
        for split, found in zip(("train", "val"), rows, strict=True)
    )


def hold_out(clips: LabelledList, share: float) -> tuple[np.ndarray, np.ndarray]:
    """(indices to train on, indices held out to choose with), the same for every seed of heads. A
    file that is listed twice is on one side."""
    files = list(dict.fromkeys(clips.names))
    count = min(max(1, round(share * len(files))), len(files) - 1) if share else 0
    order = counter_rng(0, "probe holdout").permutation(len(files))
    held = {files[i] for i in order[:count]}
    is_held = np.array([name in held for name in clips.names], bool)
    return np.flatnonzero(~is_held), np.flatnonzero(is_held)


def shared_files(train: LabelledList, val: LabelledList) -> list[str]:
    """Names that both lists hold: clips that are judged although they were learned."""
    return sorted(set(train.names) & set(val.names))


def unseen_classes(train: LabelledList, val: LabelledList) -> list[int]:
    """Classes of the validation list that no training clip shows."""
    known, asked = (
        set(np.flatnonzero(c.labels.any(axis=0)) if c.is_multi_label else c.labels)
        for c in (train, val)
    )
    return sorted(int(label) for label in asked - known)


def _read_rows(file: Path) -> list[tuple[str, str, list[int]]]:
    """(where it stands, name, labels) of every line."""
    rows = []
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no UTF-8 text ({error}): save it as UTF-8") from error
    with io.StringIO(text, newline="") as lines:
        for number, row in enumerate(csv.reader(lines), start=1):
            if not row:
                continue
            labels = row[1].split() if len(row) == 2 else ["none"]
            if not all(label.isdigit() for label in labels):
                raise ValueError(
                    f"{file} line {number}: {row} is no `relative path,label` (several labels "
                    "separated by spaces)"
                )
            rows.append((f"{file} line {number}", row[0].strip(), [int(i) for i in labels]))
    if not rows:
        raise ValueError(f"{file} lists nothing")
    return rows


def _has_class_folders(folder: Path, files) -> bool:
    """Whether train/ and val/ hold classes: there is no list, and they are no packed shards."""
    splits = [folder / split for split in ("train", "val")]
    packed = any((split / "manifest.json").is_file() for split in splits)
    return all(s.is_dir() for s in splits) and not packed and not any(f.is_file() for f in files)


def _merged(rows: list[tuple[str, str, list[int]]]) -> list[tuple[str, str, list[int]]]:
    """One row for every file, with all of its labels."""
    merged: dict[str, tuple[str, str, list[int]]] = {}
    for place, name, labels in rows:
        merged.setdefault(name, (place, name, []))[2].extend(labels)
    return list(merged.values())


def _class_folders(folder: Path) -> list[list[tuple[str, str, list[int]]]]:
    """Rows of train/CLASS/ and val/CLASS/: classes are numbered by name over both."""
    found = {}
    for split in ("train", "val"):
        paths = sorted(p for p in (folder / split).glob("*/**/*") if not p.name.startswith("."))
        found[split] = [p for p in paths if p.is_file() and (is_image(p) or is_video(p))]
    for split, paths in found.items():
        if not paths:
            raise ValueError(f"{folder / split} holds no CLASS/ folders with pictures or videos")

    def class_of(path: Path) -> str:
        return path.relative_to(folder).parts[1]

    names = sorted({class_of(path) for paths in found.values() for path in paths})
    number = {name: i for i, name in enumerate(names)}
    return [
        [(str(p), str(p.relative_to(folder)), [number[class_of(p)]]) for p in paths]
        for paths in found.values()
    ]


def _is_multi_label(rows, protocol: str | None, name: str) -> bool:
    if protocol == "multi_label":
        return True
    for split in rows:
        for place, _, labels in split:
            if len(labels) != 1:
                raise ValueError(
                    f"{place}: {len(labels)} labels; judge {name} with --protocol multi_label, or "
                    "write lists with one label per clip"
                )
    return False


def _labelled(folder: Path, split: str, rows, num_classes: int, several: bool) -> LabelledList:
    for place, _, labels in rows:
        if labels and max(labels) >= num_classes:
            raise ValueError(f"{place}: label {max(labels)}, but there are {num_classes} classes")
    names = [name for _, name, _ in rows]
    if not several:
        single = np.array([labels[0] for _, _, labels in rows])
        return LabelledList(folder, split, names, single, num_classes)
    targets = np.zeros((len(rows), num_classes), np.uint8)
    for row, (_, _, labels) in zip(targets, rows, strict=True):
        row[labels] = 1
    return LabelledList(folder, split, names, targets, num_classes)


def _instructions(name: str, benchmark: Benchmark, folder: Path, files) -> str:
    missing = ", ".join(str(file) for file in files if not file.is_file())
    if Path(name).is_dir():
        return (
            f"{name} holds neither two lists of `relative path,label` ({missing} is missing) nor "
            "folders train/CLASS/ and val/CLASS/ of videos or pictures"
        )
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
        f"or point --data_root at the folder that holds {name.lower()}/, or --dataset at a folder"
    )
