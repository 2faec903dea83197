"""The benchmarks as data: one row each, their lists, and what to do when files are not there.

A benchmark is a folder with two lists of `relative path,label` lines and the videos (or images)
they name. Several labels of a clip are separated by spaces, and it may have none:

    DATA_ROOT/NAME/train.csv   DATA_ROOT/NAME/val.csv   DATA_ROOT/NAME/<videos>

Any other folder of that form is evaluated with `--dataset PATH`, where labels may be words; so is
one of class folders: train/CLASS/... and val/CLASS/..., or CLASS/... split here. A class is the
first folder below the split, and files may lie at any depth below it. Classes with names are
numbered by name over both lists. Packed shards of the two lists may stand beside them as train/ and
val/ (`python -m data_pipeline pack`).
"""

import difflib
import hashlib
import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.codec.open_video import is_image, is_video
from data_pipeline.folders import files_below
from data_pipeline.lists import LabelledRow, read_labelled_csv, refuse_repeats
from data_pipeline.random import counter_rng

SPLITS = ("train", "val")
VALIDATION_SHARE = 0.2  # of a folder that has no train/ and val/
PREPARE = "python -m eval_encoder.probe.prepare"

Report = Callable[[str], object]  # takes a line for what is left out or chosen


@dataclass(frozen=True)
class Benchmark:
    """One row of BENCHMARKS.

    num_classes         0: read off the labels
    train_csv, val_csv  file names of the lists
    prepare             command that makes the lists, or empty; {folder} stands for the benchmark's
                        folder
    repeats_clips       whether the lists name a clip once per label, as published lists of several
                        labels do
    """

    num_classes: int
    train_csv: str = "train_new.csv"
    val_csv: str = "val_new.csv"
    prepare: str = ""
    repeats_clips: bool = False


_SSV2 = f"{PREPARE} ssv2 --annotations DIR_OF_THE_JSON_FILES --videos DIR --output {{folder}}"
_UCF101 = f"{PREPARE} ucf101 --splits DIR_OF_THE_SPLIT_LISTS --videos DIR --output {{folder}}"
_HMDB51 = f"{PREPARE} hmdb51 --splits DIR_OF_THE_SPLIT_LISTS --videos DIR --output {{folder}}"
_KINETICS = f"{PREPARE} kinetics --train TRAIN.csv --val VAL.csv --videos DIR --output {{folder}}"

BENCHMARKS = {
    "ssv2": Benchmark(174, "ssv2_train_new.csv", "ssv2_val_new.csv", prepare=_SSV2),
    "diving48": Benchmark(48, "diving48_train_new.csv", "diving48_val_new.csv"),
    "perception_test": Benchmark(63),
    "epic_verb": Benchmark(97),
    "epic_noun": Benchmark(300),
    "ucf101": Benchmark(101, prepare=_UCF101),
    "hmdb51": Benchmark(51, prepare=_HMDB51),
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
        8, "train.csv", "val.csv", prepare="python -m data_pipeline motion-shapes {folder}"
    ),
    "brief_events": Benchmark(
        8, "train.csv", "val.csv", prepare="python -m data_pipeline brief-events {folder}"
    ),
    "tempo": Benchmark(
        6,
        "train.csv",
        "val.csv",
        prepare="python -m data_pipeline tempo {folder} VIDEO_OR_FOLDER ...",
    ),
}


class MissingBenchmark(ValueError):
    """A benchmark whose files are not on disk; the message shows the expected tree and the command
    that makes it."""


@dataclass(frozen=True)
class LabelledList:
    """One split.

    names    of the clips, relative to `folder`
    labels   int64 [N] or, where clips have several, 0/1 uint8 [N, classes]
    classes  names of the classes in the order of their numbers, where labels are words
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
        """Folder of packed shards of this split, beside the list, if there is one."""
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
    report: Report = print,
) -> tuple[LabelledList, LabelledList]:
    """Training and validation list of a benchmark, or of a folder.

    Raises MissingBenchmark when the files are absent. Raises ValueError with file and line for a
    line that is not `path,label`, a label out of range or not an integer (lists of one's own may
    have words), a clip in two lines, or several labels under the single-label protocol.
    """
    # The name of a benchmark comes before a folder that happens to be called so.
    is_own = name.lower() not in BENCHMARKS and Path(name).is_dir()
    benchmark = Benchmark(0, "train.csv", "val.csv") if is_own else find_benchmark(name)
    folder = Path(name) if is_own else data_root / name.lower()
    files = [
        folder / (train_csv or benchmark.train_csv),
        folder / (val_csv or benchmark.val_csv),
    ]
    several = protocol == "multi_label"

    splits = None
    classes: tuple[str, ...] = ()
    if all(file.is_file() for file in files):
        splits = [read_labelled_csv(file, lambda clip: (folder / clip).exists()) for file in files]
        if is_own:
            classes = _words(splits, several)
    elif not (train_csv or val_csv) and not any(file.is_file() for file in files):
        splits = _class_folder_rows(folder, may_split=is_own, report=report)
        names = {row.label for rows in splits or () for row in rows}
        classes = tuple(sorted(names))
    if splits is None:
        raise MissingBenchmark(_instructions(name, folder=folder, files=files))

    numbers = [_numbers(rows, classes, several=several, name=name) for rows in splits]
    if not several and not benchmark.repeats_clips:
        for rows in splits:
            refuse_repeats(rows, "keep one line, or evaluate with --protocol multi_label")
    # A class may lack clips, or have them in one list alone, so the largest number of both counts.
    every_label = [label for split in numbers for own in split for label in own]
    largest = max(every_label, default=0)
    count = num_classes or benchmark.num_classes or len(classes) or largest + 1
    train, val = (
        _labelled(
            folder / split,
            rows,
            numbers=own,
            several=several,
            num_classes=count,
            classes=classes,
        )
        for split, rows, own in zip(SPLITS, splits, numbers, strict=True)
    )
    return train, val


def hold_out(clips: LabelledList, share: float) -> tuple[np.ndarray, np.ndarray]:
    """(indices to train on, indices held out to choose with), the same for every seed of heads. A
    file that is listed twice is on one side."""
    files = list(dict.fromkeys(clips.names))
    count = 0
    if share:
        # at least one file on either side
        count = max(1, round(share * len(files)))
        count = min(count, len(files) - 1)
    order = counter_rng(0, "probe holdout").permutation(len(files))
    held = {files[i] for i in order[:count]}
    is_held = np.array([name in held for name in clips.names], bool)
    return np.flatnonzero(~is_held), np.flatnonzero(is_held)


def shared_files(train: LabelledList, val: LabelledList) -> list[str]:
    """Names that both lists hold: clips that are evaluated although they were learned."""
    return sorted(set(train.names) & set(val.names))


def unseen_classes(train: LabelledList, val: LabelledList) -> list[int]:
    """Classes of the validation list that no training clip shows."""
    learned = train.labels
    asked = val.labels
    # both lists are read under one protocol; a column of several labels is a class
    if train.is_multi_label:
        learned = np.flatnonzero(learned.any(axis=0))
    if val.is_multi_label:
        asked = np.flatnonzero(asked.any(axis=0))
    return np.setdiff1d(asked, learned).tolist()


def _words(rows: list[list[LabelledRow]], several: bool) -> tuple[str, ...]:
    """Classes of two lists in the order of their numbers, which is that of the words; none where
    labels are numbers. ValueError where one list has both."""
    labelled = [row for split in rows for row in split if row.label]
    if all(row.numbers is not None for row in labelled):
        return ()
    has_words = labelled[0].numbers is None
    words: set[str] = set()
    for row in labelled:
        # Several labels are separated by spaces, but one class may be named `riding a bike`.
        own = row.label.split() if several else [row.label]
        has_letters = [any(map(str.isalpha, word)) for word in own]
        # one row may mix words and integers only where it has several labels
        is_mixed = several and not all(has_letters)
        if (row.numbers is None) != has_words or is_mixed:
            raise ValueError(
                f"{row.place}: label {row.label!r}, but {labelled[0].place} has "
                f"{labelled[0].label!r}: write all labels as integers or all as words"
            )
        words.update(own)
    return tuple(sorted(words))


def _numbers(
    rows: list[LabelledRow], classes: tuple[str, ...], several: bool, name: str
) -> list[list[int]]:
    """Numbers of each row's classes; `classes` are the words of the lists, if they have words."""
    number = {word: i for i, word in enumerate(classes)}
    numbers = []
    for row in rows:
        own = row.numbers
        if row.label in number:
            own = [number[row.label]]
        elif classes:
            own = [number[word] for word in row.label.split()]
        if own is None:
            raise ValueError(
                f"{row.place}: label {row.label!r} is no integer: classes of {name} are numbers"
            )
        if not several and len(own) != 1:
            raise ValueError(
                f"{row.place}: {len(own)} labels; evaluate {name} with --protocol multi_label, "
                "or write lists with one label per clip"
            )
        numbers.append(own)
    return numbers


def _labelled(
    path: Path,
    rows: list[LabelledRow],
    numbers: list[list[int]],
    several: bool,
    num_classes: int,
    classes: tuple[str, ...],
) -> LabelledList:
    """The list of the split FOLDER/SPLIT. With several labels, lines that name one file are one
    clip. Raises ValueError for a label that is out of range."""
    for row, own in zip(rows, numbers, strict=True):
        largest = max(own, default=-1)  # a clip of several labels may have none
        if largest >= num_classes:
            raise ValueError(f"{row.place}: label {largest}, but there are {num_classes} classes")
    names = [row.name for row in rows]
    if several:
        # published lists of several labels name a clip once per label
        clip_of = {name: clip for clip, name in enumerate(dict.fromkeys(names))}
        labels = np.zeros((len(clip_of), num_classes), np.uint8)
        for name, own in zip(names, numbers, strict=True):
            labels[clip_of[name], own] = 1
        names = list(clip_of)
    else:
        labels = np.array([own[0] for own in numbers])
    return LabelledList(
        folder=path.parent,
        split=path.name,
        names=names,
        labels=labels,
        num_classes=num_classes,
        classes=classes,
    )


def _instructions(name: str, folder: Path, files: list[Path]) -> str:
    """What to do for a benchmark, or a folder, whose files are not there."""
    absent = [str(file) for file in files if not file.is_file()]
    missing = ", ".join(absent)
    if Path(name).is_dir():
        return (
            f"{name} holds neither two lists of `relative path,label` ({missing} is missing) nor "
            "folders train/CLASS/ and val/CLASS/ of videos or pictures, nor two or more CLASS/ "
            "folders alone"
        )
    prepare = find_benchmark(name).prepare.format(folder=folder)
    command = "write the two lists from the benchmark's own split files"
    if prepare:
        command = f"make the lists with\n  {prepare}"
    return (
        f"benchmark {name} is not on disk: {missing} is missing. Expected:\n"
        f"  {folder}/\n    {files[0].name}      lines of `relative path,label`\n"
        f"    {files[1].name}\n    <the videos>\n{command}\n"
        f"or point --data_root at the folder that holds {name.lower()}/, or --dataset at a folder"
    )


def _class_folder_rows(
    folder: Path, may_split: bool, report: Report
) -> list[list[LabelledRow]] | None:
    """Rows of the training and the validation list of class folders, labels being names of classes;
    None where the folder holds no class folders.

    may_split: whether CLASS/ folders without train/ and val/ are split by hash, which is reported
    with the share. Raises ValueError for a split without any file of a class.
    """
    splits = [folder / split for split in SPLITS]
    if any((path / "manifest.json").is_file() for path in (folder, *splits)):
        return None  # packed shards without the lists that they were packed from
    if all(split.is_dir() for split in splits):
        lists = [_rows_in_classes(split, report, prefix=f"{split.name}/") for split in splits]
        for split, rows in zip(splits, lists, strict=True):
            if not rows:
                raise ValueError(f"{split} holds no CLASS/ folders with pictures or videos")
        return lists
    if any(split.is_dir() for split in splits) or not may_split:
        return None
    rows = _rows_in_classes(folder, report)
    # One folder of files is a folder of videos without labels, not a set of one class.
    if len({row.label for row in rows}) < 2:
        return None
    return _split_by_hash(folder, rows, report=report)


def _rows_in_classes(folder: Path, report: Report, prefix: str = "") -> list[LabelledRow]:
    """Images and videos of the class folders. prefix: put before their names in lists."""
    # Links out are followed: sets are often put together from links to where the files are.
    clips = [
        name
        for name in files_below(folder, report, leave_folder=True)
        if is_image(Path(name)) or is_video(Path(name))
    ]
    stray = [name for name in clips if "/" not in name]
    if stray:
        report(
            f"{len(stray)} files of {folder} lie in no class folder and are left out, {min(stray)} "
            "first"
        )
    return [
        LabelledRow(place=str(folder / name), name=prefix + name, label=name.split("/", 1)[0])
        for name in clips
        if "/" in name
    ]


def _split_by_hash(
    folder: Path, rows: list[LabelledRow], report: Report
) -> list[list[LabelledRow]]:
    """Both lists; a class of two files or more is in both."""
    classes = defaultdict(list)
    for row in rows:
        classes[row.label].append(row.name)
    held: set[str] = set()
    for members in classes.values():
        ordered = sorted(members, key=_hash)
        # A path's own hash decides, so that added files move no others; but where no hash of a
        # class is below the share, its lowest one validates, and where all are, its highest trains.
        below = sum(_hash(name) < VALIDATION_SHARE for name in ordered)
        count = min(max(below, 1), len(ordered) - 1)
        held.update(ordered[:count])
    train = [row for row in rows if row.name not in held]
    val = [row for row in rows if row.name in held]
    report(
        f"{folder} has no train/ and val/: its {len(classes)} class folders are split by a hash of "
        f"the paths, {VALIDATION_SHARE:.0%} for validation: {len(train)} files to train on, "
        f"{len(val)} to validate on. Clips cut from one recording may be in both: make train/ and "
        "val/ for figures to compare"
    )
    return [train, val]


def _hash(name: str) -> float:
    """A number in [0, 1) that depends on the relative path alone."""
    # fsencode gives a name its bytes on disk, also where they are no UTF-8
    digest = hashlib.sha256(os.fsencode(name)).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
