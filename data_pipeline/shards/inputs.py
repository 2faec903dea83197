"""What the user named -> a fixed list of inputs, each a place and the name stored in the shard.

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
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from model_factory.command_line.command import WRITE_FAULTS
from model_factory.command_line.plain_text import printable, show

from ..codec.open_video import InputLimits, is_image, is_video
from ..errors import MissingData, RejectedInput
from ..folders import files_below, is_hidden
from ..text_lists import csv_rows, list_lines, settled_name

VERSION_KEYS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "CRC", "md5Hash")
LIST_SUFFIXES = (".txt", ".csv")


@dataclass(frozen=True)
class Input:
    """One file to pack: where it is (a path or URL) and the name stored in the shard."""

    place: str
    source: str

    @property
    def is_remote(self) -> bool:
        """Whether the place is a URL."""
        return "://" in self.place


def list_inputs(arguments: list[str | Path], report=show) -> list[Input]:
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


def _each_once(inputs: list[Input], report) -> list[Input]:
    """The inputs without those whose file was named before."""
    first: dict[str, Input] = {}
    for item in inputs:
        key = item.place if item.is_remote else os.path.abspath(item.place)
        first.setdefault(key, item)
    repeated = len(inputs) - len(first)
    if repeated:
        report(f"{repeated} inputs are named more than once: each is packed once")
    return list(first.values())


def _with_distinct_sources(inputs: list[Input], report) -> list[Input]:
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
        return replace(item, source=item.place)
    parts = Path(os.path.abspath(item.place)).parts[1:]
    length = len(PurePosixPath(item.source).parts) + 1
    return replace(item, source="/".join(parts[-length:]))


def input_stamp(item: Input) -> list:
    """What changes when a file is written anew, found without reading it: [size, modification time
    in ns], of a URL [size, versions by its file system], [None, None] for what is not there.
    """
    if item.is_remote:
        return list(_remote_stamp(item.place))
    try:
        status = Path(item.place).stat()
    except OSError:
        return [None, None]
    return [status.st_size, status.st_mtime_ns]


def inputs_sha256(inputs: list[Input]) -> str:
    """Identity of a task: names, sizes and modification times of its inputs."""
    lines = [[item.source, *input_stamp(item)] for item in inputs]
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()


def _remote_stamp(place: str) -> tuple[int | None, str | None]:
    try:
        system, name = _filesystem(place)
        info = system.info(name)
        return info.get("size"), json.dumps([str(info.get(key)) for key in VERSION_KEYS])
    except Exception:  # unreachable: the decoder's turn will say so, and name the input
        return None, None


@contextlib.contextmanager
def local_copy(place: str, limits: InputLimits):
    """Path of an input on this machine: its own, or a temporary copy of a remote one.

    Raises RejectedInput: too_large before anything is fetched, missing when it cannot be. Raises
    OSError with the folder when the temporary disk has no room.
    """
    if "://" not in place:
        yield Path(place)
        return
    try:
        system, name = _filesystem(place)
    except MissingData as error:
        raise RejectedInput("missing", str(error)) from error
    with tempfile.TemporaryDirectory(prefix="univit-") as folder:
        path = Path(folder) / f"input{PurePosixPath(name).suffix}"
        try:
            size = system.size(name) or 0
            if size > limits.max_bytes:
                raise RejectedInput(
                    "too_large", f"{place} has {size} bytes, the limit is {limits.max_bytes}"
                )
            system.get_file(name, str(path))
        except RejectedInput:
            raise
        except Exception as error:  # every file system has its own errors
            if isinstance(error, OSError) and error.errno in WRITE_FAULTS:
                raise OSError(error.errno, os.strerror(error.errno), folder) from error
            raise RejectedInput("missing", f"{place} cannot be fetched: {error}") from error
        yield path


def _folder_inputs(folder: Path, report) -> list[Input]:
    files = files_below(folder, report)
    known = [name for name in files if _is_input(name)]
    if len(known) < len(files):
        kinds = {_kind(name) for name in files if not _is_input(name)}
        report(
            f"{len(files) - len(known)} files of {folder} are neither videos nor images by name "
            f"and are left out: {', '.join(map(printable, sorted(kinds)[:10]))}"
        )
    return [Input(str(folder / name), name) for name in known]


def _is_input(name: str) -> bool:
    path = Path(name)
    return is_video(path) or is_image(path)


def _kind(name: str) -> str:
    """What a file's name says of its kind: the ending, or the whole name without one."""
    return Path(name).suffix or Path(name).name


def _listed_inputs(path: Path) -> list[Input]:
    """Inputs of a list: whole lines of a .txt, the first column of a .csv."""
    if path.suffix.lower() == ".csv":
        rows = [(row.place, row.cells[0].strip()) for row in csv_rows(path)]
    else:
        rows = [(place, line.strip()) for place, line in list_lines(path)]
    folder = path.parent
    inputs = []
    for place, text in rows:
        if text:
            name = settled_name(text, lambda name: (folder / name).exists(), place)
            inputs.append(Input(name if "://" in name else str(folder / name), name))
    return inputs


def _remote_inputs(url: str) -> list[Input]:
    system, name = _filesystem(url)
    if not system.exists(name):
        raise MissingData(f"{url} does not exist")
    if not system.isdir(name):
        return [Input(url, PurePosixPath(name).name)]
    root = name.rstrip("/") + "/" if name.strip("/") else ""
    found = [(path, path.removeprefix(root)) for path in sorted(system.find(name))]
    head, chain, rest = url.partition("::")
    scheme = head.split("://")[0]
    return [
        Input(f"{scheme}://{path}{chain}{rest}", source)
        for path, source in found
        if _is_input(source) and not is_hidden(source)
    ]


def _filesystem(url: str):
    """fsspec's (file system, name in it); MissingData says what to install."""
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
