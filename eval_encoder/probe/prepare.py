"""Official split files -> the two lists of a benchmark: `python -m eval_encoder.probe.prepare ...`.

    ssv2       videos ID.webm
    ucf101     videos CLASS/NAME.avi
    hmdb51     videos CLASS/NAME.avi
    kinetics   videos [SPLIT/][CLASS/]ID_START_END.mp4 (six digits) or [SPLIT/][CLASS/]ID.mp4

What the official files hold is described in official.py. Videos that are named but absent are
counted and written to absent_SPLIT.txt; they stay in the lists, so that the probe knows what it has
not evaluated.

A video may have any ending that can be read. It is found by the end of its path, so it does not
matter how deep the folder lies, nor whether there are folders of splits (train/CLASS/NAME.mp4, as
torchvision and SlowFast lay Kinetics out), of splits alone (train/NAME.mp4, as CVDF does) or of
classes alone. Of several files the one in the folder of its own split is meant, then the one in the
folder of its class. Nothing beyond is guessed: what is left is settled by the ending that the list
itself gives, or is an error.
"""

import argparse
import csv
import os
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from data_pipeline.codec.open_video import is_video
from data_pipeline.folders import files_below
from data_pipeline.lists import settled_name
from model_factory.command_line.command import run_command
from model_factory.command_line.local_output import output_path
from model_factory.command_line.plain_text import printable, show

from .official import Entry, Splits, read_hmdb51, read_kinetics, read_ssv2, read_ucf101

# Endings for the names of absent videos where the official list has none.
SUFFIXES = {"ssv2": ".webm", "ucf101": ".avi", "hmdb51": ".avi"}
SUFFIXES |= dict.fromkeys(("k400", "k600", "k700"), ".mp4")
# Names of a split's folder; train_256 and val_256 hold resized copies in common preparations.
SPLIT_FOLDERS = {
    "train": re.compile(r"train(ing)?(_\d+)?"),
    "val": re.compile(r"val(id|idate|idation)?(_\d+)?"),
}
# torchvision leaves these out of class folders, and writes an underscore for a space.
DROPPED_CHARACTERS = str.maketrans(" ", "_", "'()")


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
    # here, since it imports numpy, which `--help` can do without
    from .benchmarks import find_benchmark

    index = VideoIndex(videos, report=_warn)
    suffix = SUFFIXES[dataset]
    lists = {
        split: index.find_all(entries, split, suffix=suffix) for split, entries in splits.items()
    }
    for split, (rows, absent) in lists.items():
        if len(absent) == len(rows):
            example = "none is named"
            if rows:
                example = os.path.relpath(next(iter(rows)), output)
            raise ValueError(
                f"none of the {len(rows)} {split} videos is below {videos}, for example "
                f"{example}: give the folder of the videos"
            )

    benchmark = find_benchmark(dataset)
    files = {"train": benchmark.train_csv, "val": benchmark.val_csv}
    output.mkdir(parents=True, exist_ok=True)
    counts = {}
    for split, (rows, absent) in lists.items():
        # Names of files may hold bytes that are no UTF-8: they are written as they are on disk.
        with open(
            output / files[split], "w", newline="", encoding="utf-8", errors="surrogateescape"
        ) as stream:
            writer = csv.writer(stream)
            for path, entry in rows.items():
                writer.writerow((os.path.relpath(path, output), entry.label))
        (output / f"absent_{split}.txt").write_text(
            "".join(f"{name}\n" for name in absent), encoding="utf-8", errors="surrogateescape"
        )
        counts[split] = (len(rows) - len(absent), len(absent))
    return counts


class VideoIndex:
    """Videos below a folder by name, read once: a listing costs less than asking for every name."""

    def __init__(self, folder: Path, report: Callable[[str], object]) -> None:
        if not folder.is_dir():
            raise ValueError(f"--videos {folder} is no folder")
        self._folder = folder
        self._report = report
        self._by_stem: dict[str, list[PurePosixPath]] = defaultdict(list)
        # Links may lead out: benchmarks are often put together from links to several discs.
        for name in files_below(folder, report, leave_folder=True):
            path = PurePosixPath(name)
            if is_video(Path(name)):
                self._by_stem[path.stem].append(path)

    def find_all(
        self, entries: list[Entry], split: str, suffix: str
    ) -> tuple[dict[Path, Entry], list[str]]:
        """({video: its entry}, names of those that are absent), both in the list's order.

        suffix: ending of absent videos where the list gives none. Raises ValueError where two lines
        give one video two classes.
        """
        rows: dict[Path, Entry] = {}
        absent = []
        repeated = 0
        for entry in entries:
            name = "/".join(filter(None, (entry.class_name, entry.names[0])))
            found = self.find(entry, split)
            # an absent video is listed under the path that it would have
            video = found or self._folder / f"{name}{entry.ending or suffix}"
            before = rows.setdefault(video, entry)
            if before is not entry:  # listed already, by another line
                repeated += 1
                if before.label != entry.label:
                    raise ValueError(
                        f"{entry.place}: {video} has class {entry.label} here and {before.label} "
                        f"in {before.place}: a clip has one class, so remove one of the lines"
                    )
            elif found is None:
                absent.append(name)
        if repeated:
            self._report(f"{repeated} lines of {split} name a video again: it is listed once")
        return rows, absent

    def find(self, entry: Entry, split: str) -> Path | None:
        """The video of an entry of `train` or `val`; None where there is none.

        Raises ValueError with the line where several files may be meant, and where its bytes are
        no UTF-8 and name no file.
        """
        for listed in entry.names:
            name = settled_name(
                listed, exists=lambda name: bool(self._named(name)), place=entry.place
            )
            videos = self._named(name)
            if videos:
                return self._folder / self._best(videos, name, entry=entry, split=split)
        return None

    def _named(self, name: str) -> list[PurePosixPath]:
        """Videos whose path, without ending, is the name or ends with it."""
        parts = PurePosixPath(name).parts
        return [
            path
            for path in self._by_stem.get(parts[-1] if parts else "", [])
            if path.with_suffix("").parts[-len(parts) :] == parts
        ]

    def _best(
        self, videos: list[PurePosixPath], name: str, entry: Entry, split: str
    ) -> PurePosixPath:
        """Which of several videos is meant; ValueError where that is not clear."""
        if len(videos) == 1:
            return videos[0]
        misfits = {
            path: _misfit(path, name=name, class_name=entry.class_name, split=split)
            for path in videos
        }
        least = min(misfits.values())
        best = [path for path in videos if misfits[path] == least]
        own = [path for path in best if path.suffix == entry.ending]
        if len(own) == 1:
            return own[0]
        if len(best) > 1:
            paths = [str(self._folder / path) for path in best[:2]]
            first, second = map(printable, paths)
            raise ValueError(
                f"{entry.place}: {printable(name)} may be {first} or {second}, and the list does "
                "not say which: move one away"
            )
        return best[0]


def _misfit(path: PurePosixPath, name: str, class_name: str, split: str) -> tuple[int, bool, bool]:
    """How badly a path fits, in the order of importance: not in its split's folder (2: in that of
    the other split), not in its class's folder, other folders around it."""
    folders = path.parent.parts
    own = SPLIT_FOLDERS[split]
    other = SPLIT_FOLDERS["val" if split == "train" else "train"]
    split_misfit = 1
    if any(own.fullmatch(part.lower()) for part in folders):
        split_misfit = 0
    elif any(other.fullmatch(part.lower()) for part in folders):
        split_misfit = 2
    wanted = _plain(class_name)
    in_class = not class_name or any(_plain(part) == wanted for part in folders)
    # tuples compare from the left, so the split counts most
    return split_misfit, not in_class, str(path.with_suffix("")) != name


def _plain(name: str) -> str:
    """A class's name as its folder may be called."""
    return name.lower().translate(DROPPED_CHARACTERS)


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
    if args.dataset == "ucf101":
        return "ucf101", read_ucf101(args.splits, args.split)
    return "hmdb51", read_hmdb51(args.splits, args.split)


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
