"""Official split files -> the two lists of a benchmark: `python -m eval_encoder.probe.prepare ...`.

    ssv2       videos ID.webm
    ucf101     videos CLASS/NAME.avi
    hmdb51     videos CLASS/NAME.avi
    kinetics   videos [SPLIT/][CLASS/]ID_START_END.mp4 (six digits) or [SPLIT/][CLASS/]ID.mp4

What the official files hold is said in probe_official, how a video is found in probe_find. Videos
may have any ending that can be read, and lie at any depth. Those that are named but absent are
counted and written to absent_SPLIT.txt; they stay in the lists, so that the probe knows what it has
not evaluated.
"""

import argparse
import csv
import os
import sys
from pathlib import Path

from model_factory.command_line.command import run_command
from model_factory.command_line.local_output import output_path
from model_factory.command_line.plain_text import show

from .official import Splits, read_hmdb51, read_kinetics, read_ssv2, read_ucf101

# Endings for the names of absent videos where the official list has none.
SUFFIXES = {"ssv2": ".webm", "ucf101": ".avi", "hmdb51": ".avi"}
SUFFIXES |= dict.fromkeys(("k400", "k600", "k700"), ".mp4")


def build_parser() -> argparse.ArgumentParser:
    """Command line of this module."""
    parser = argparse.ArgumentParser(
        prog="python -m eval_encoder.probe.prepare", description=__doc__.split("\n")[0]
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


def write_lists(
    dataset: str, splits: Splits, videos: Path, output: Path
) -> dict[str, tuple[int, int]]:
    """Write the two lists and absent_SPLIT.txt; returns split -> (found, absent videos). Paths in
    the lists are relative to `output`.

    Raises ValueError when no video at all is found, when it is not clear which file is meant, and
    when two lines give one video two classes. Nothing is written then.
    """
    from .benchmarks import find_benchmark
    from .find import VideoIndex

    benchmark = find_benchmark(dataset)
    files = {"train": benchmark.train_csv, "val": benchmark.val_csv}
    index = VideoIndex(videos, report=_warn)
    lists = {
        split: index.find_all(entries, split, suffix=SUFFIXES[dataset])
        for split, entries in splits.items()
    }
    for split, (rows, absent) in lists.items():
        if len(absent) == len(rows):
            example = os.path.relpath(next(iter(rows)), output) if rows else "none is named"
            raise ValueError(
                f"none of the {len(rows)} {split} videos is below {videos}, for example "
                f"{example}: give the folder of the videos"
            )
    output.mkdir(parents=True, exist_ok=True)
    for split, (rows, absent) in lists.items():
        lines = [(os.path.relpath(path, output), entry.label) for path, entry in rows.items()]
        # Names of files may hold bytes that are no UTF-8: they are written as they are on disk.
        coding = {"encoding": "utf-8", "errors": "surrogateescape"}
        with open(output / files[split], "w", newline="", **coding) as stream:
            csv.writer(stream).writerows(lines)
        text = "".join(f"{name}\n" for name in absent)
        (output / f"absent_{split}.txt").write_text(text, **coding)
    return {
        split: (len(rows) - len(absent), len(absent)) for split, (rows, absent) in lists.items()
    }


def _warn(line: str) -> None:
    show(line, error=True)


def _read(args: argparse.Namespace) -> tuple[str, Splits]:
    """(benchmark, entries) of a command."""
    if args.dataset == "ssv2":
        return "ssv2", read_ssv2(args.annotations)
    if args.dataset == "kinetics":
        splits = read_kinetics(args.train, args.val)
        classes = 1 + max(entry.label for entries in splits.values() for entry in entries)
        if f"k{classes}" in SUFFIXES:
            return f"k{classes}", splits
        _warn(f"{classes} classes, not 400, 600 or 700: numbered by name")
        return "k700", splits
    read = {"ucf101": read_ucf101, "hmdb51": read_hmdb51}[args.dataset]
    return args.dataset, read(args.splits, args.split)


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    return run_command(parse=build_parser().parse_args, work=_prepare, argv=argv)


def _prepare(args: argparse.Namespace) -> None:
    dataset, splits = _read(args)
    counts = write_lists(dataset, splits, videos=args.videos, output=args.output)
    for split, (listed, absent) in counts.items():
        names = args.output / f"absent_{split}.txt"
        print(f"{split}: {listed} videos found, {absent} named but absent ({names})")


if __name__ == "__main__":
    sys.exit(main())
