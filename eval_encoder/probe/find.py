"""Which file of a folder is the video that an official line names.

A video is found by the end of its path, so it does not matter how deep the folder lies, nor whether
there are folders of splits (train/CLASS/NAME.mp4, as torchvision and SlowFast lay Kinetics out),
of splits alone (train/NAME.mp4, as CVDF does) or of classes alone. Of several files the one in the
folder of its own split is meant, then the one in the folder of its class. Nothing beyond is
guessed: what is left is settled by the ending that the list itself gives, or is an error.
"""

import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from data_pipeline.codec.open_video import is_video
from data_pipeline.folders import files_below
from data_pipeline.lists import settled_name
from model_factory.command_line.plain_text import printable

from .official import Entry

# Names of a split's folder; train_256 and val_256 hold resized copies in common preparations.
SPLIT_FOLDERS = {
    "train": re.compile(r"train(ing)?(_\d+)?"),
    "val": re.compile(r"val(id|idate|idation)?(_\d+)?"),
}
# torchvision leaves these out of class folders, and writes an underscore for a space.
DROPPED_CHARACTERS = str.maketrans(" ", "_", "'()")


class VideoIndex:
    """Videos below a folder by name, read once: a listing costs less than asking for every name."""

    def __init__(self, folder: Path, report: Callable[[str], object]):
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
            video = found or self._folder / f"{name}{entry.ending or suffix}"
            before = rows.setdefault(video, entry)
            if before is not entry:
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
            name = settled_name(listed, lambda name: bool(self._named(name)), entry.place)
            found = self._named(name)
            if found:
                return self._folder / self._best(found, name, entry, split)
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
        self, found: list[PurePosixPath], name: str, entry: Entry, split: str
    ) -> PurePosixPath:
        if len(found) == 1:
            return found[0]
        ranks = {path: _rank(path, name, entry.class_name, split) for path in found}
        best = [path for path in found if ranks[path] == min(ranks.values())]
        own = [path for path in best if path.suffix == entry.ending]
        if len(own) == 1:
            return own[0]
        if len(best) > 1:
            first, second = (printable(str(self._folder / path)) for path in best[:2])
            raise ValueError(
                f"{entry.place}: {printable(name)} may be {first} or {second}, and the list does "
                "not say which: move one away"
            )
        return best[0]


def _rank(path: PurePosixPath, name: str, class_name: str, split: str) -> tuple[int, bool, bool]:
    """How well a path fits, smaller is better: its split's folder, its class's, nothing around."""
    folders = path.parent.parts
    own = SPLIT_FOLDERS[split]
    other = SPLIT_FOLDERS["val" if split == "train" else "train"]
    if any(own.fullmatch(part.lower()) for part in folders):
        split_rank = 0
    else:
        split_rank = 2 if any(other.fullmatch(part.lower()) for part in folders) else 1
    wanted = _plain(class_name)
    in_class = not class_name or any(_plain(part) == wanted for part in folders)
    return split_rank, not in_class, str(path.with_suffix("")) != name


def _plain(name: str) -> str:
    return name.lower().translate(DROPPED_CHARACTERS)
