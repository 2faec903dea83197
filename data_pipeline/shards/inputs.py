"""What the user named -> a fixed list of inputs, each a location and the name stored in the shard.

Local files are named by path. Anything with a scheme (`s3://`, `gs://`, `zip://a.mp4::x.zip`, ...)
is remote: fsspec, where installed, lists it here and fetches one file at a time for the decoder,
which itself only ever opens local files.
"""

import contextlib
import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from model_factory.command_line.command import WRITE_FAULTS
from model_factory.command_line.plain_text import printable, show

from ..codec.open_video import InputLimits, is_image, is_video
from ..errors import MissingData, RejectedInput
from ..folders import files_below, is_hidden
from ..lists import csv_rows, list_lines, settled_name

# how fsspec's file systems name the version of a file: S3, HTTP, Azure, local, zip, GCS
VERSION_KEYS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "CRC", "md5Hash")
LIST_SUFFIXES = (".txt", ".csv")
MAX_SHOWN_KINDS = 10  # of files that are left out: a line of a log

Report = Callable[[str], object]  # takes one line at a time


@dataclass(frozen=True)
class Input:
    """One file to pack: where it is (a path or URL) and the name stored in the shard."""

    location: str
    source: str

    @property
    def is_remote(self) -> bool:
        """Whether the location is a URL."""
        return "://" in self.location


def list_inputs(arguments: Sequence[str | Path], report: Report = show) -> list[Input]:
    """Expand files, folders, lists and URLs into inputs, in a stable order, each file once and each
    under a name of its own.

    Folders give their videos and images, sorted, named relative to the folder; hidden entries and
    links that lead out of the folder are left out and reported. Lists give whole lines (.txt) or
    the first column (.csv), relative to the list's folder. Raises MissingData for an argument that
    does not exist or names nothing.
    """
    inputs: list[Input] = []
    for argument in map(str, arguments):
        path = Path(argument)
        if "://" in argument:
            inputs += _remote_inputs(argument)
        elif path.is_dir():
            inputs += _folder_inputs(path, report)
        elif path.suffix.lower() in LIST_SUFFIXES and path.is_file():
            inputs += _listed_inputs(path)
        elif path.exists():
            inputs.append(Input(argument, path.name))
        else:
            raise MissingData(
                f"{argument} does not exist: give files, folders, URLs, or .txt/.csv lists of files"
            )
    if not inputs:
        raise MissingData(f"no video or image in {', '.join(map(str, arguments))}")
    return _with_distinct_sources(_each_once(inputs, report), report)


def _each_once(inputs: list[Input], report: Report) -> list[Input]:
    """The inputs without those that name a file again: ./a.mp4 for a.mp4, or through a link to its
    folder. A link to a file is a file of its own."""
    first: dict[str, Input] = {}
    real_folders: dict[str, str] = {}
    for item in inputs:
        identity = item.location
        if not item.is_remote:
            folder, name = os.path.split(item.location)
            if folder not in real_folders:
                real_folders[folder] = os.path.realpath(folder)
            identity = os.path.join(real_folders[folder], name)
        first.setdefault(identity, item)
    repeated = len(inputs) - len(first)
    if repeated:
        report(f"{repeated} inputs are named more than once: each is packed once")
    return list(first.values())


def _with_distinct_sources(inputs: list[Input], report: Report) -> list[Input]:
    """The inputs; those that share a source are named with as many of their folders as it takes.

    Labels find their sample by its source, so two samples of one source could not be labelled.
    """
    named = inputs
    while True:
        count = Counter(item.source for item in named)
        if len(count) == len(named):
            break
        # A longer name can meet another input's, which the next round settles. Every round adds a
        # folder, and whole paths differ, so this ends.
        named = [_longer_source(item) if count[item.source] > 1 else item for item in named]
    changed = [new.source for new, old in zip(named, inputs, strict=True) if new != old]
    if changed:
        report(
            f"{len(changed)} inputs share a name with one of another folder: they are named with "
            f"their folder, {printable(changed[0])} first"
        )
    return named


def _longer_source(item: Input) -> Input:
    """The input, named with one more folder of its path; a URL as a whole."""
    if item.is_remote:
        return replace(item, source=item.location)
    parts = Path(os.path.abspath(item.location)).parts[1:]
    length = len(PurePosixPath(item.source).parts) + 1
    return replace(item, source="/".join(parts[-length:]))


def input_stamp(item: Input) -> list:
    """What changes when a file is written anew, found without reading it: [size, modification time
    in ns], of a URL [size, versions by its file system], [None, None] for what is not there.
    """
    try:
        if item.is_remote:
            system, name = _filesystem(item.location)
            info = system.info(name)
            # as text: S3 gives a datetime, which JSON does not hold
            versions = [str(info.get(key)) for key in VERSION_KEYS]
            return [info.get("size"), json.dumps(versions)]
        status = Path(item.location).stat()
        return [status.st_size, status.st_mtime_ns]
    # each file system has errors of its own; reading the input fails later, and names it
    except Exception:
        return [None, None]


def inputs_sha256(inputs: Sequence[Input]) -> str:
    """Identity of a task: names, sizes and modification times of its inputs."""
    lines = [[item.source, *input_stamp(item)] for item in inputs]
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()


@contextlib.contextmanager
def local_copy(location: str, limits: InputLimits) -> Iterator[Path]:
    """Path of an input on this machine: its own, or a temporary copy of a remote one.

    Raises RejectedInput: too_large before anything is fetched, missing when it cannot be. Raises
    OSError with the folder when the temporary disk has no room.
    """
    if "://" not in location:
        yield Path(location)
        return
    with tempfile.TemporaryDirectory(prefix="univit-") as folder:
        try:
            system, name = _filesystem(location)
            path = Path(folder) / f"input{PurePosixPath(name).suffix}"
            size = system.size(name) or 0
            if size > limits.max_bytes:
                raise RejectedInput(
                    "too_large", f"{location} has {size} bytes, the limit is {limits.max_bytes}"
                )
            system.get_file(name, str(path))
        except RejectedInput:
            raise
        except MissingData as error:
            raise RejectedInput("missing", str(error)) from error
        except Exception as error:  # every file system has its own errors
            if isinstance(error, OSError) and error.errno in WRITE_FAULTS:
                raise OSError(error.errno, os.strerror(error.errno), folder) from error
            raise RejectedInput("missing", f"{location} cannot be fetched: {error}") from error
        yield path


def _folder_inputs(folder: Path, report: Report) -> list[Input]:
    inputs = []
    others = []
    for name in files_below(folder, report):
        if _is_input(name):
            inputs.append(Input(str(folder / name), name))
        else:
            others.append(Path(name).suffix or Path(name).name)
    if others:
        kinds = sorted(set(others))[:MAX_SHOWN_KINDS]
        report(
            f"{len(others)} files of {folder} are neither videos nor images by name "
            f"and are left out: {', '.join(map(printable, kinds))}"
        )
    return inputs


def _is_input(name: str) -> bool:
    path = Path(name)
    return is_video(path) or is_image(path)


def _listed_inputs(path: Path) -> list[Input]:
    """Inputs of a list: whole lines of a .txt, the first column of a .csv."""
    if path.suffix.lower() == ".csv":
        lines = [(row.place, row.cells[0]) for row in csv_rows(path)]
    else:
        lines = list(list_lines(path))
    folder = path.parent
    inputs = []
    for line_of_file, text in lines:
        if text.strip():
            name = settled_name(
                text.strip(),
                exists=lambda name: (folder / name).exists(),
                place=line_of_file,
            )
            location = name if "://" in name else str(folder / name)
            inputs.append(Input(location, source=name))
    return inputs


def _remote_inputs(url: str) -> list[Input]:
    system, name = _filesystem(url)
    if not system.exists(name):
        raise MissingData(f"{url} does not exist")
    if not system.isdir(name):
        return [Input(url, PurePosixPath(name).name)]
    # a chained URL names the folder first and then what it lies in: zip://FOLDER::s3://x.zip
    head, chain, rest = url.partition("::")
    scheme = head.split("://")[0]
    root = name.rstrip("/") + "/" if name.strip("/") else ""
    inputs = []
    for path in sorted(system.find(name)):
        source = path.removeprefix(root)
        if _is_input(source) and not is_hidden(source):
            location = f"{scheme}://{path}{chain}{rest}"
            inputs.append(Input(location, source=source))
    return inputs


def _filesystem(url: str) -> tuple[Any, str]:
    """fsspec's (file system, name in it); MissingData names what to install."""
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise MissingData(
            f"{url} is remote: pip install fsspec and the library of its scheme"
        ) from error
    try:
        return url_to_fs(url)
    except Exception as error:  # a missing library, a bad archive, an unknown scheme
        raise MissingData(f"{url} cannot be opened: {error}") from error
