"""Official split files of benchmarks -> entries: which video, which class, and where it is written.

    ssv2       something-something-v2-{train,validation,labels}.json, with or without the prefix; a
               class is its template with the brackets taken away
    ucf101     classInd.txt, trainlist01.txt, testlist01.txt
    hmdb51     CLASS_test_split1.txt with 1 for training, 2 for testing, 0 for neither
    kinetics   two csv files with the columns label, youtube_id, time_start, time_end; classes are
               numbered by name over both files

Every error names file and line.
"""

import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from data_pipeline.folders import is_hidden
from data_pipeline.lists import NUMBER, csv_rows, is_text, list_lines
from model_factory.command_line.plain_text import printable, show

KINETICS_COLUMNS = ("label", "youtube_id", "time_start", "time_end")


@dataclass(frozen=True)
class Entry:
    """One official line.

    names       what the video may be called, best first: the end of its path, without ending
    place       file and line, for messages
    ending      the list's own, "" where it names none
    class_name  what the class's folder may be called, "" where `names` contain it
    """

    names: tuple[str, ...]
    label: int
    place: str
    ending: str = ""
    class_name: str = ""


Splits = dict[str, list[Entry]]


def read_ssv2(annotations: Path) -> Splits:
    """Entries of the official JSON files; ValueError for missing or unknown content."""
    path, numbers = _read_json(annotations, "labels")
    if not isinstance(numbers, dict):
        raise ValueError(f"{path} is no object of class names and their numbers")
    classes: dict[str, int] = {}
    for name, number in numbers.items():
        # The official file writes numbers as strings; a boolean or a fraction is neither.
        is_number = type(number) in (int, str) and NUMBER.fullmatch(str(number))
        if not is_number:
            raise ValueError(f"{path}: class {name!r} has number {number!r}: no integer from 0 on")
        classes[name] = int(number)
    splits: Splits = {}
    for split, file in (("train", "train"), ("val", "validation")):
        path, rows = _read_json(annotations, file)
        if not isinstance(rows, list):
            raise ValueError(f"{path} is no list of entries with id and template")
        splits[split] = []
        for number, row in enumerate(rows, start=1):
            place = f"{path} entry {number}"
            is_entry = isinstance(row, dict) and {"id", "template"} <= row.keys()
            # `Holding [something]` in an entry is `Holding something` in the labels file.
            template = ""
            if is_entry:
                template = str(row["template"]).replace("[", "").replace("]", "")
            if template not in classes:
                raise ValueError(f"{place}: {row} has no id and template of the labels file")
            names = (str(row["id"]),)
            splits[split].append(Entry(names, label=classes[template], place=place))
    return splits


def read_ucf101(folder: Path, number: int) -> Splits:
    """Entries of the official lists; ValueError for a missing file or an unknown class."""
    classes: dict[str, int] = {}
    for place, line in list_lines(folder / "classInd.txt"):
        index, _, name = line.strip().partition(" ")
        if not NUMBER.fullmatch(index) or int(index) < 1 or not name:
            raise ValueError(f"{place}: '{printable(line)}' is no `number name`, numbers from 1 on")
        classes[name] = int(index) - 1  # labels count from 0
    splits: Splits = {}
    for split, file in (("train", "trainlist"), ("val", "testlist")):
        lines = list_lines(folder / f"{file}{number:02d}.txt")
        splits[split] = [_ucf101_entry(line, classes, place=place) for place, line in lines]
    return splits


def _ucf101_entry(line: str, classes: dict[str, int], place: str) -> Entry:
    """Entry of `CLASS/NAME.avi`, in training lists with the class's number behind it."""
    name, index = _last_word(line)
    if not NUMBER.fullmatch(index):
        name = line.strip()
        index = ""
    video = PurePosixPath(name)
    class_name = video.parent.name
    if class_name not in classes:
        raise ValueError(f"{place}: class {class_name!r} is not in classInd.txt")
    label = classes[class_name]
    if index and int(index) != label + 1:
        raise ValueError(
            f"{place}: class {index}, but classInd.txt gives {class_name} the number {label + 1}"
        )
    names = (str(video.with_suffix("")),)
    return Entry(names, label=label, place=place, ending=video.suffix)


def read_hmdb51(folder: Path, number: int) -> Splits:
    """Entries of the official lists, one file per class; ValueError where there are none."""
    # here, since benchmarks imports numpy, and `--help` of prepare imports this file
    from .benchmarks import find_benchmark

    suffix = f"_test_split{number}.txt"
    # Each list is a class, so a `._CLASS_test_split1.txt` of a file manager would be one too.
    found = folder.glob(f"*{suffix}")
    files = sorted(path for path in found if not is_hidden(path.name))
    if not files:
        raise ValueError(f"{folder} holds no CLASS{suffix}: give the folder of the official lists")
    expected = find_benchmark("hmdb51").num_classes
    if len(files) != expected:
        show(f"{len(files)} classes have lists, of {expected}", error=True)
    splits: Splits = {"train": [], "val": []}
    for label, path in enumerate(files):
        name = path.name.removesuffix(suffix)
        for place, line in list_lines(path):
            video, use = _last_word(line)
            if use not in ("0", "1", "2") or not video:
                raise ValueError(f"{place}: '{printable(line)}' is no `NAME.avi` with 0, 1 or 2")
            if use != "0":  # each of the three splits leaves some clips out
                file = PurePosixPath(video)
                names = (f"{name}/{file.stem}",)
                entry = Entry(names, label=label, place=place, ending=file.suffix)
                splits["train" if use == "1" else "val"].append(entry)
    return splits


def _last_word(line: str) -> tuple[str, str]:
    """(what stands before, the last word) of a line that is not blank."""
    *before, last = line.rsplit(maxsplit=1)
    return "".join(before).strip(), last


def read_kinetics(train: Path, val: Path) -> Splits:
    """Entries of the official csv files; ValueError for missing columns."""
    rows = {"train": _kinetics_rows(train), "val": _kinetics_rows(val)}
    # over both files, so that a class has one number in both
    labels = {row["label"] for listed in rows.values() for _, row in listed}
    classes = sorted(labels)
    number = {name: i for i, name in enumerate(classes)}
    splits: Splits = {}
    for split, listed in rows.items():
        splits[split] = [
            Entry(
                names=_kinetics_names(row, place),
                label=number[row["label"]],
                place=place,
                class_name=row["label"],
            )
            for place, row in listed
        ]
    return splits


def _kinetics_rows(path: Path) -> list[tuple[str, dict[str, str]]]:
    """(file and line, values by column) of every line after the header."""
    rows = list(csv_rows(path))
    columns = [cell.strip() for cell in rows[0].cells] if rows else []
    has_columns = set(KINETICS_COLUMNS) <= set(columns)
    if len(rows) < 2 or not has_columns:
        raise ValueError(f"{path} lacks the columns {', '.join(KINETICS_COLUMNS)}, or has no line")
    clips = []
    for row in rows[1:]:
        # A line may be shorter or longer than the header: what it lacks is noticed below.
        values = dict(zip(columns, map(str.strip, row.cells), strict=False))
        if not all(values.get(name) for name in KINETICS_COLUMNS):
            raise ValueError(f"{row.place}: {', '.join(KINETICS_COLUMNS)} must all be given")
        if not is_text(values["label"]):
            label = printable(values["label"])
            raise ValueError(f"{row.place}: label {label!r} is no UTF-8: save the list as UTF-8")
        clips.append((row.place, values))
    return clips


def _kinetics_names(row: dict[str, str], place: str) -> tuple[str, ...]:
    """ID_START_END with six digits, as all downloaders write it, else the id alone."""
    try:
        # names of files hold whole seconds, whatever the list writes
        start = int(float(row["time_start"]))
        end = int(float(row["time_end"]))
    except (ValueError, OverflowError) as error:
        raise ValueError(
            f"{place}: times {row['time_start']!r} and {row['time_end']!r} are no seconds"
        ) from error
    video = row["youtube_id"]
    return f"{video}_{start:06d}_{end:06d}", video


def _read_json(annotations: Path, name: str) -> tuple[Path, object]:
    """(file, content) of one of the official files."""
    for candidate in (f"something-something-v2-{name}.json", f"{name}.json"):
        path = annotations / candidate
        if path.is_file():
            try:
                return path, json.loads(path.read_bytes())
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path} is no JSON: {error}") from error
    raise ValueError(
        f"{annotations} holds no something-something-v2-{name}.json: give the folder of the "
        "official files"
    )
