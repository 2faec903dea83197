"""Files below a folder that a user named: hidden entries, links and loops are settled here.

Hidden and system entries (`.ipynb_checkpoints`, `@eaDir`, `Thumbs.db`, ...) are no data. Only names
below the folder count: a user may well keep videos in `/home/me/.data`. Every real folder is read
once, whatever links lead to it. Cost: one listing per folder and one look-up per link.
"""

import errno
import os
from collections import deque
from collections.abc import Callable
from pathlib import Path

from model_factory.command_line.plain_text import printable

# What file managers, NAS boxes and archivers leave between a user's files; compared in lower case.
# Names that begin with a dot (.DS_Store, ._clip.mp4, .Trashes) need no entry.
SYSTEM_NAMES = frozenset(
    {
        "@eadir",
        "@recycle",
        "#recycle",
        "$recycle.bin",
        "__macosx",
        "__pycache__",
        "desktop.ini",
        "ehthumbs.db",
        "lost+found",
        "system volume information",
        "thumbs.db",
    }
)
LEFT_OUT = {
    "outside": "links lead out of {folder} and are left out, {first} first: "
    "name their targets in a list to pack them",
    "loop": "links of {folder} lead back to themselves or to a folder around them and are left "
    "out, {first} first",
    "broken": "links of {folder} lead to nothing and are left out, {first} first",
    "repeated": "links of {folder} lead to folders that are read anyway and are left out, "
    "{first} first",
    "unreadable": "folders of {folder} cannot be read and are left out, {first} first: "
    "check their permissions",
    "hidden": "hidden or system files and folders of {folder} are left out, {first} first",
}


def is_hidden(name: str) -> bool:
    """Whether a path relative to the user's folder has a hidden or a system part."""
    parts = name.split("/")
    return any(part.startswith(".") or part.lower() in SYSTEM_NAMES for part in parts)


def files_below(
    folder: Path, report: Callable[[str], object], leave_folder: bool = False
) -> list[str]:
    """Names of all files below a folder, relative to it and with `/`, sorted by their parts.

    Links to files give a name of their own; links to folders are followed to folders that were not
    read yet. With `leave_folder` links may lead out of the folder. `report` takes one line for
    every kind of entry that is left out.
    """
    walk = _Walk(str(folder), leave_folder)
    walk.run()
    for kind, names in walk.left_out.items():
        if names:
            text = LEFT_OUT[kind].format(folder=folder, first=printable(min(names)))
            report(f"{len(names)} {text}")
    return sorted(walk.files, key=lambda name: name.split("/"))


class _Walk:
    """One walk: the files found, and the names left out by kind."""

    def __init__(self, folder: str, leave_folder: bool):
        self.files: list[str] = []
        self.left_out: dict[str, list[str]] = {kind: [] for kind in LEFT_OUT}
        self._root = os.path.realpath(folder)
        self._leave_folder = leave_folder
        self._read: set[tuple[int, int]] = set()
        self._links: deque[tuple[str, str]] = deque()

    def run(self) -> None:
        """Read everything. Links to folders wait until all real folders were read, so that files
        which can be reached both ways carry the name of their real folder."""
        self._read_tree("", self._root)
        while self._links:
            name, target = self._links.popleft()
            if not self._read_tree(f"{name}/", target):
                self.left_out["repeated"].append(name)

    def _read_tree(self, prefix: str, top: str) -> bool:
        """Read a real folder and the real folders below it; False when it was read before."""
        waiting = [(prefix, top)]
        read_before = len(self._read)
        while waiting:
            prefix, path = waiting.pop()
            try:
                status = os.stat(path)
                # Device and inode instead of the path: bind mounts have several paths.
                identity = (status.st_dev, status.st_ino)
                if identity in self._read:
                    continue
                self._read.add(identity)
                with os.scandir(path) as listing:
                    entries = sorted(listing, key=lambda entry: entry.name)
            except OSError:
                self.left_out["unreadable"].append(prefix.rstrip("/") or ".")
                continue
            folders = []
            for entry in entries:
                folder = self._read_entry(entry, prefix=prefix, parent=path)
                if folder is not None:
                    folders.append(folder)
            # the first of them is read next
            waiting += reversed(folders)
        return len(self._read) > read_before

    def _read_entry(
        self, entry: os.DirEntry[str], prefix: str, parent: str
    ) -> tuple[str, str] | None:
        """Note a file or a link; returns (prefix, path) of a real folder, which is not yet read."""
        name = prefix + entry.name
        if is_hidden(entry.name):
            self.left_out["hidden"].append(name)
        elif entry.is_symlink():
            self._read_link(name, parent=parent, path=entry.path)
        elif entry.is_dir(follow_symlinks=False):
            return f"{name}/", entry.path
        else:
            self.files.append(name)
        return None

    def _read_link(self, name: str, parent: str, path: str) -> None:
        try:
            os.stat(path)  # follows the link to its end
        except OSError as error:
            kind = "loop" if error.errno == errno.ELOOP else "broken"
            self.left_out[kind].append(name)
            return
        target = os.path.realpath(path)
        if _holds(target, parent) or _holds(target, self._root):
            self.left_out["loop"].append(name)
        elif not self._leave_folder and not _holds(self._root, target):
            self.left_out["outside"].append(name)
        elif os.path.isdir(target):
            self._links.append((name, target))
        else:
            self.files.append(name)


def _holds(outer: str, inner: str) -> bool:
    """Whether a real path is another one or lies below it."""
    # with the separator, or /data would hold /data2
    return inner == outer or inner.startswith(outer.rstrip("/") + "/")
