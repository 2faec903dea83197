"""Official split files -> the two lists of a benchmark: `python -m eval_encoder.probe_prepare ...`.

    ssv2       something-something-v2-{train,validation,labels}.json, with or without the prefix; a
               class is its template with the brackets taken away; videos ID.webm
    ucf101     classInd.txt, trainlist01.txt, testlist01.txt; videos CLASS/NAME.avi
    hmdb51     CLASS_test_split1.txt with 1 for training, 2 for testing, 0 for neither; videos
               CLASS/NAME.avi
    kinetics   two csv files with the columns label, youtube_id, time_start, time_end; videos
               [LABEL/]ID_START_END.mp4 (six digits) or [LABEL/]ID.mp4; classes are numbered by
               name over both files

Videos may have any ending that can be read. Those that are named but absent are counted and written
to absent_SPLIT.txt; they stay in the lists, so that the probe knows what it has not judged.
"""

import argparse
import csv
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from model_factory.local_output import output_path

SUFFIXES = {"ssv2": ".webm", "ucf101": ".avi", "hmdb51": ".avi"}
SUFFIXES |= dict.fromkeys(("k400", "k600", "k700"), ".mp4")


@dataclass(frozen=True)
class Entry:
    """One official line: names the video may have below the folder, without ending; its class."""

    names: tuple[str, ...]
    label: int


Splits = dict[str, list[Entry]]


def build_parser() -> argparse.ArgumentParser:
    """Command line of this module."""
    parser = argparse.ArgumentParser(
        prog="python -m eval_encoder.probe_prepare", description=__doc__.split("\n")[0]
    )
    commands = parser.add_subparsers(dest="dataset", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--videos", type=Path, required=True, help="folder of the videos")
    common.add_argument("--output", type=output_path, required=True, help="DATA_ROOT/NAME")
    ssv2 = commands.add_parser("ssv2", parents=[common], help="Something-Something v2")
    ssv2.add_argument("--annotations", type=Path, required=True, help="folder of the JSON files")
    for name, title in (("ucf101", "UCF101"), ("hmdb51", "HMDB51")):
        one = commands.add_parser(name, parents=[common], help=title)
        one.add_argument("--splits", type=Path, required=True, help="folder of the split lists")
        one.add_argument("--split", type=int, choices=(1, 2, 3), default=1, help="which of three")
    kinetics = commands.add_parser("kinetics", parents=[common], help="Kinetics 400, 600 or 700")
    kinetics.add_argument("--train", type=Path, required=True, help="official training csv")
    kinetics.add_argument("--val", type=Path, required=True, help="official validation csv")
    return parser


def read_ssv2(annotations: Path) -> Splits:
    """Entries of the official JSON files; ValueError for missing or unknown content."""
    classes = {name: int(index) for name, index in _read_json(annotations, "labels").items()}
    splits: Splits = {}
    for split, file in (("train", "train"), ("val", "validation")):
        splits[split] = []
        for entry in _read_json(annotations, file):
            known = isinstance(entry, dict) and {"id", "template"} <= entry.keys()
            template = entry["template"].replace("[", "").replace("]", "") if known else None
            if template not in classes:
                raise ValueError(
                    f"{file} in {annotations}: {entry} has no id and template of the labels file"
                )
            splits[split].append(Entry((str(entry["id"]),), classes[template]))
    return splits


def read_ucf101(folder: Path, number: int) -> Splits:
    """Entries of the official lists; ValueError for a missing file or an unknown class."""
    classes = {}
    for line in _lines(folder / "classInd.txt"):
        index, _, name = line.strip().partition(" ")
        if not index.isdigit() or not name:
            raise ValueError(f"{folder / 'classInd.txt'}: {line!r} is no `number name`")
        classes[name] = int(index) - 1
    splits: Splits = {}
    for split, file in (("train", "trainlist"), ("val", "testlist")):
        path = folder / f"{file}{number:02d}.txt"
        splits[split] = []
        for line in _lines(path):
            video = Path(line.split()[0])
            if video.parent.name not in classes:
                raise ValueError(f"{path}: class {video.parent.name!r} is not in classInd.txt")
            splits[split].append(Entry((str(video.with_suffix("")),), classes[video.parent.name]))
    return splits


def read_hmdb51(folder: Path, number: int) -> Splits:
    """Entries of the official lists, one file per class; ValueError where there are none."""
    suffix = f"_test_split{number}.txt"
    files = sorted(folder.glob(f"*{suffix}"))
    if not files:
        raise ValueError(f"{folder} holds no CLASS{suffix}: give the folder of the official lists")
    if len(files) != find_classes("hmdb51"):
        print(f"{len(files)} classes have lists, of {find_classes('hmdb51')}", file=sys.stderr)
    splits: Splits = {"train": [], "val": []}
    for label, path in enumerate(files):
        name = path.name.removesuffix(suffix)
        for line in _lines(path):
            video, use = line.rsplit(maxsplit=1)
            if use not in ("0", "1", "2"):
                raise ValueError(f"{path}: {line!r} does not end with 0, 1 or 2")
            if use != "0":
                entry = Entry((f"{name}/{Path(video).stem}",), label)
                splits["train" if use == "1" else "val"].append(entry)
    return splits


def read_kinetics(train: Path, val: Path) -> Splits:
    """Entries of the official csv files; ValueError for missing columns."""
    rows = {"train": _kinetics_rows(train), "val": _kinetics_rows(val)}
    names = sorted({row["label"] for found in rows.values() for row in found})
    number = {name: i for i, name in enumerate(names)}
    return {
        split: [Entry(_kinetics_names(row), number[row["label"]]) for row in found]
        for split, found in rows.items()
    }


def find_classes(dataset: str) -> int:
    """Number of classes of a benchmark."""
    from .probe_datasets import find_benchmark

    return find_benchmark(dataset).num_classes


def write_lists(
    dataset: str, splits: Splits, videos: Path, output: Path
) -> dict[str, tuple[int, int]]:
    """Write the two lists and absent_SPLIT.txt; returns split -> (found, absent videos). Paths in
    the lists are relative to `output`. Raises ValueError when no video at all is found."""
    from .probe_datasets import find_benchmark

    benchmark = find_benchmark(dataset)
    files = {"train": benchmark.train_csv, "val": benchmark.val_csv}
    known = _videos_below(videos)
    lists: dict[str, tuple[list, list[str]]] = {}
    for split, entries in splits.items():
        rows, absent = [], []
        for entry in entries:
            video = next((known[name] for name in entry.names if name in known), None)
            if video is None:
                absent.append(entry.names[0])
                video = videos / f"{entry.names[0]}{SUFFIXES[dataset]}"
            rows.append((os.path.relpath(video, output), entry.label))
        if len(absent) == len(rows):
            raise ValueError(
                f"none of the {len(rows)} {split} videos is below {videos}, for example "
                f"{rows[0][0] if rows else 'none is named'}: give the folder of the videos"
            )
        lists[split] = (rows, absent)
    output.mkdir(parents=True, exist_ok=True)
    for split, (rows, absent) in lists.items():
        with open(output / files[split], "w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows(rows)
        (output / f"absent_{split}.txt").write_text("".join(f"{name}\n" for name in absent))
    return {
        split: (len(rows) - len(absent), len(absent)) for split, (rows, absent) in lists.items()
    }


def _videos_below(folder: Path) -> dict[str, Path]:
    """{path below the folder without ending: file}, read once: a listing costs less than asking
    for every name."""
    from data_pipeline.codec.open_video import is_video

    if not folder.is_dir():
        raise ValueError(f"--videos {folder} is no folder")
    found = {}
    for place, _, files in os.walk(folder, followlinks=True):
        for name in files:
            path = Path(place, name)
            if is_video(path):
                found[str(path.relative_to(folder).with_suffix(""))] = path
    return found


def _kinetics_rows(path: Path) -> list[dict]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give the official csv file")
    with open(path, newline="", encoding="utf-8-sig") as stream:
        rows = list(csv.DictReader(stream))
    wanted = ("label", "youtube_id", "time_start", "time_end")
    if not rows or not set(wanted) <= rows[0].keys():
        raise ValueError(f"{path} lacks the columns {', '.join(wanted)}, or has no line")
    for number, row in enumerate(rows, start=2):
        if not all(row[name] for name in wanted):
            raise ValueError(f"{path} line {number}: {', '.join(wanted)} must all be given")
    return rows


def _kinetics_names(row: dict) -> tuple[str, ...]:
    try:
        start, end = (int(float(row[name])) for name in ("time_start", "time_end"))
    except ValueError as error:
        raise ValueError(f"Kinetics line {row}: times are no numbers") from error
    plain = (f"{row['youtube_id']}_{start:06d}_{end:06d}", row["youtube_id"])
    folders = (row["label"], row["label"].replace(" ", "_"))
    return (*(f"{folder}/{name}" for name in plain for folder in folders), *plain)


def _lines(path: Path) -> Iterable[str]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give the folder of the official lists")
    return [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]


def _read_json(annotations: Path, name: str):
    for candidate in (f"something-something-v2-{name}.json", f"{name}.json"):
        path = annotations / candidate
        if path.is_file():
            try:
                return json.loads(path.read_bytes())
            except ValueError as error:
                raise ValueError(f"{path} is no JSON: {error}") from error
    raise ValueError(
        f"{annotations} holds no something-something-v2-{name}.json: give the folder of the "
        "official files"
    )


def _read(args: argparse.Namespace) -> tuple[str, Splits]:
    """(benchmark, entries) of a command."""
    if args.dataset == "ssv2":
        return "ssv2", read_ssv2(args.annotations)
    if args.dataset == "kinetics":
        splits = read_kinetics(args.train, args.val)
        classes = 1 + max(entry.label for entries in splits.values() for entry in entries)
        if f"k{classes}" in SUFFIXES:
            return f"k{classes}", splits
        print(f"{classes} classes, not 400, 600 or 700: numbered by name", file=sys.stderr)
        return "k700", splits
    read = {"ucf101": read_ucf101, "hmdb51": read_hmdb51}[args.dataset]
    return args.dataset, read(args.splits, args.split)


def main(argv: list[str] | None = None) -> None:
    """Run one command; a user's mistake ends with its message."""
    args = build_parser().parse_args(argv)
    try:
        counts = write_lists(*_read(args), args.videos, args.output)
    except ValueError as error:
        sys.exit(f"error: {error}")
    for split, (listed, absent) in counts.items():
        names = args.output / f"absent_{split}.txt"
        print(f"{split}: {listed} videos found, {absent} named but absent ({names})")


if __name__ == "__main__":
    main()
