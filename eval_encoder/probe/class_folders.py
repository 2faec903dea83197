"""Folders of classes as two lists: train/CLASS/... and val/CLASS/..., or CLASS/... split here.

A class is the first folder below the split; files may lie at any depth below it. Classes are
numbered by name over both lists.
"""

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from data_pipeline.codec.open_video import is_image, is_video
from data_pipeline.folders import files_below
from data_pipeline.lists import LabelledRow

SPLITS = ("train", "val")
VALIDATION_SHARE = 0.2  # of a folder that has no train/ and val/


def class_folder_rows(
    folder: Path, may_split: bool, report: Callable[[str], object]
) -> list[list[LabelledRow]] | None:
    """Rows of the training and the validation list, labels being names of classes; None where the
    folder holds no class folders.

    may_split: whether CLASS/ folders without train/ and val/ are split by hash, which `report` is
    told with the share. Raises ValueError for a split without any file of a class.
    """
    is_split = [(folder / split).is_dir() for split in SPLITS]
    packed = [folder, *(folder / split for split in SPLITS)]
    if any((place / "manifest.json").is_file() for place in packed):
        return None
    if all(is_split):
        return [_split_rows(folder, split, report) for split in SPLITS]
    if any(is_split) or not may_split:
        return None
    names = _names_in_classes(folder, report)
    # One folder of files is a folder of videos without labels, not a set of one class.
    if len({_class_of(name) for name in names}) < 2:
        return None
    return _split_by_hash(folder, names, report)


def _split_rows(folder: Path, split: str, report) -> list[LabelledRow]:
    names = _names_in_classes(folder / split, report)
    if not names:
        raise ValueError(f"{folder / split} holds no CLASS/ folders with pictures or videos")
    return [_row(folder, f"{split}/{name}", _class_of(name)) for name in names]


def _names_in_classes(folder: Path, report) -> list[str]:
    """Pictures and videos of the class folders, relative to the folder."""
    # Links out are followed: sets are often put together from links to where the files are.
    found = [
        name
        for name in files_below(folder, report, leave_folder=True)
        if is_image(Path(name)) or is_video(Path(name))
    ]
    inside = [name for name in found if "/" in name]
    if len(inside) < len(found):
        stray = min(set(found) - set(inside))
        report(
            f"{len(found) - len(inside)} files of {folder} lie in no class folder and are left "
            f"out, {stray} first"
        )
    return inside


def _split_by_hash(folder: Path, names: list[str], report) -> list[list[LabelledRow]]:
    """Both lists; a class of two files or more is in both."""
    classes = defaultdict(list)
    for name in names:
        classes[_class_of(name)].append(name)
    held: set[str] = set()
    for members in classes.values():
        ordered = sorted(members, key=_hash)
        # The hash of a path decides, not its rank: a file that is added moves no other.
        below = sum(_hash(name) < VALIDATION_SHARE for name in ordered)
        count = min(max(below, 1), len(ordered) - 1)
        held.update(ordered[:count])
    rows = [_row(folder, name, _class_of(name)) for name in names]
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
    digest = hashlib.sha256(os.fsencode(name)).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _class_of(name: str) -> str:
    return name.split("/", 1)[0]


def _row(folder: Path, name: str, label: str) -> LabelledRow:
    return LabelledRow(place=str(folder / name), name=name, label=label)
