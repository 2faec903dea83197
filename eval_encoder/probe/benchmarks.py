"""The benchmarks as data: one row each, their lists, and what to do when files are not there.

A benchmark is a folder with two lists of `relative path,label` lines and the videos (or pictures)
they name. Several labels of a clip are separated by spaces, and it may have none:

    DATA_ROOT/NAME/train.csv   DATA_ROOT/NAME/val.csv   DATA_ROOT/NAME/<videos>

Any other folder of that form is evaluated with `--dataset PATH`, where labels may be words; so is
one of class folders (probe_class_folders). Packed shards of the two lists may stand beside them as
train/ and val/ (`python -m data_pipeline pack`).
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.lists import LabelledRow, read_labelled_csv, refuse_repeats
from data_pipeline.random import counter_rng

from .class_folders import SPLITS, class_folder_rows

PREPARE = "python -m eval_encoder.probe.prepare"


@dataclass(frozen=True)
class Benchmark:
    """Number of classes (0: read off the labels), file names of the lists, the command that makes
    them, and whether they name a clip once per label, as published lists of several labels do."""

    num_classes: int
    train_csv: str = "train_new.csv"
    val_csv: str = "val_new.csv"
    prepare: str = ""
    repeats_clips: bool = False


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
    "charadesego": Benchmark(157, repeats_clips=True),
    "charadesego_v1_only1st": Benchmark(157, repeats_clips=True),
    "charadesego_v1_only3rd": Benchmark(157, repeats_clips=True),
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
    uint8 [N, classes]; names of the classes where labels are words; and the packed shards beside
    the list, if any.
    """

    folder: Path
    split: str
    names: list[str]
    labels: np.ndarray
    num_classes: int
    classes: tuple[str, ...] = ()

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


@dataclass(frozen=True)
class _Clip:
    """One clip of a list: where it is listed, its name, and the numbers of its classes."""

    place: str
    name: str
    labels: list[int]


def read_lists(
    name: str,
    data_root: Path,
    train_csv: str | None = None,
    val_csv: str | None = None,
    num_classes: int = 0,
    protocol: str | None = None,
    report: Callable[[str], object] = print,
) -> tuple[LabelledList, LabelledList]:
    """Training and validation list of a benchmark, or of a folder. `report` takes a line for what
    is left out or chosen here.

    Raises MissingBenchmark without the files, ValueError with file and line for what is no
    `path,label`, a label that is no integer (in a list of one's own: or word) or out of range, a
    clip in two lines, or several labels under the single-label protocol.
    """
    is_own = name.lower() not in BENCHMARKS and Path(name).is_dir()
    if is_own:
        benchmark = Benchmark(0, "train.csv", "val.csv")
        folder = Path(name)
    else:
        benchmark = find_benchmark(name)
        folder = data_root / name.lower()
    files = (folder / (train_csv or benchmark.train_csv), folder / (val_csv or benchmark.val_csv))
    rows = None
    classes: tuple[str, ...] = ()
    several = protocol == "multi_label"
    if all(file.is_file() for file in files):
        rows = [read_labelled_csv(file, lambda clip: (folder / clip).exists()) for file in files]
        if is_own:
            classes = _words(rows, several)
    elif not (train_csv or val_csv) and not any(file.is_file() for file in files):
        rows = class_folder_rows(folder, may_split=is_own, report=report)
        classes = tuple(sorted({row.label for split in rows or () for row in split}))
    if rows is None:
        raise MissingBenchmark(_instructions(name, benchmark, folder, files))
    clips = [_numbered(split, classes, several, name) for split in rows]
    if not several and not benchmark.repeats_clips:
        for split in rows:
            refuse_repeats(split, "keep one line, or evaluate with --protocol multi_label")
    if several:
        clips = [_merged(split) for split in clips]
    largest = max((i for split in clips for clip in split for i in clip.labels), default=0)
    count = num_classes or benchmark.num_classes or len(classes) or largest + 1
    train, val = (
        _labelled(folder, split, found, count, classes, several)
        for split, found in zip(SPLITS, clips, strict=True)
    )
    return train, val


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


def _words(rows: list[list[LabelledRow]], several: bool) -> tuple[str, ...]:
    """Classes of two lists in the order of their numbers, which is that of the words; none where
    labels are numbers. ValueError where one list has both."""
    labelled = [row for split in rows for row in split if row.label]
    if not labelled or all(row.numbers is not None for row in labelled):
        return ()
    has_words = labelled[0].numbers is None
    words: set[str] = set()
    for row in labelled:
        # Several labels are separated by spaces, but one class may be named `riding a bike`.
        own = row.label.split() if several else [row.label]
        is_mixed = several and not all(any(map(str.isalpha, word)) for word in own)
        if (row.numbers is None) != has_words or is_mixed:
            raise ValueError(
                f"{row.place}: label {row.label!r}, but {labelled[0].place} has "
                f"{labelled[0].label!r}: write all labels as integers or all as words"
            )
        words.update(own)
    return tuple(sorted(words))


def _numbered(
    rows: list[LabelledRow], classes: tuple[str, ...], several: bool, name: str
) -> list[_Clip]:
    """Clips of a list; `classes` are its words, if it has words."""
    number = {word: i for i, word in enumerate(classes)}
    clips = []
    for row in rows:
        labels = row.numbers
        if row.label in number:
            labels = [number[row.label]]
        elif classes:
            labels = [number[word] for word in row.label.split()]
        if labels is None:
            raise ValueError(
                f"{row.place}: label {row.label!r} is no integer: classes of {name} are numbers"
            )
        if not several and len(labels) != 1:
            raise ValueError(
                f"{row.place}: {len(labels)} labels; evaluate {name} with --protocol multi_label, "
                "or write lists with one label per clip"
            )
        clips.append(_Clip(row.place, row.name, labels))
    return clips


def _merged(clips: list[_Clip]) -> list[_Clip]:
    """One clip for every file, with all of its labels."""
    merged: dict[str, _Clip] = {}
    for clip in clips:
        found = merged.setdefault(clip.name, _Clip(clip.place, clip.name, []))
        found.labels.extend(clip.labels)
    return list(merged.values())


def _labelled(
    folder: Path,
    split: str,
    clips: list[_Clip],
    num_classes: int,
    classes: tuple[str, ...],
    several: bool,
) -> LabelledList:
    for clip in clips:
        if clip.labels and max(clip.labels) >= num_classes:
            raise ValueError(
                f"{clip.place}: label {max(clip.labels)}, but there are {num_classes} classes"
            )
    if several:
        labels = np.zeros((len(clips), num_classes), np.uint8)
        for row, clip in zip(labels, clips, strict=True):
            row[clip.labels] = 1
    else:
        labels = np.array([clip.labels[0] for clip in clips])
    names = [clip.name for clip in clips]
    return LabelledList(folder, split, names, labels, num_classes, classes)


def _instructions(name: str, benchmark: Benchmark, folder: Path, files) -> str:
    missing = ", ".join(str(file) for file in files if not file.is_file())
    if Path(name).is_dir():
        return (
            f"{name} holds neither two lists of `relative path,label` ({missing} is missing) nor "
            "folders train/CLASS/ and val/CLASS/ of videos or pictures, nor two or more CLASS/ "
            "folders alone"
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
