"""What the user named -> a fixed list of inputs, each a place and the name stored in the shard.

Local files are named by path. Anything with a scheme (`s3://`, `gs://`, `zip://a.mp4::x.zip`, ...)
is remote: fsspec, where installed, lists it here and fetches one file at a time for the decoder,
which itself only ever opens local files.
"""

import contextlib
import csv
import hashlib
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..codec.open_video import InputLimits, is_image, is_video
from ..errors import MissingData, RejectedInput

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


def list_inputs(arguments: list[str | Path], report=print) -> list[Input]:
    """Expand files, folders, lists and URLs into inputs, in a stable order.

    Folders give their videos and images, sorted, named relative to the folder; links that lead out
    of the folder are left out and reported. Lists give whole lines (.txt) or the first column
    (.csv), relative to the list's folder. Raises MissingData for an argument that does not exist
    or names nothing.
    """
    inputs: list[Input] = []
    for argument in map(str, arguments):
        path = Path(argument)
        if "://" in argument:
            inputs += _remote_inputs(argument)
        elif path.is_dir():
            inputs += _folder_inputs(path, report)
        elif path.suffix.lower() in LIST_SUFFIXES and path.is_file():
            inputs += [_listed_input(path.parent, name) for name in _listed(path)]
        elif path.exists():
            inputs.append(Input(argument, path.name))
        else:
            raise MissingData(
                f"{argument} does not exist: give files, folders, URLs, or .txt/.csv lists of files"
            )
    if not inputs:
        raise MissingData(f"no video or image in {', '.join(map(str, arguments))}")
    return inputs


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

    Raises RejectedInput: too_large before anything is fetched, missing when it cannot be.
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
            raise RejectedInput("missing", f"{place} cannot be fetched: {error}") from error
        yield path


def _folder_inputs(folder: Path, report) -> list[Input]:
    root = folder.resolve()
    files = sorted(path for path in folder.rglob("*") if not path.is_dir())
    outside = [path for path in files if not path.resolve().is_relative_to(root)]
    files = [path for path in files if path not in set(outside)]
    known = [path for path in files if is_video(path) or is_image(path)]
    if outside:
        report(
            f"{len(outside)} links lead out of {folder} and are left out, {outside[0].name} first: "
            "name their targets in a list to pack them"
        )
    if len(known) < len(files):
        others = sorted({path.suffix or path.name for path in files} - {p.suffix for p in known})
        report(
            f"{len(files) - len(known)} files of {folder} are neither videos nor images by name "
            f"and are left out: {', '.join(others[:10])}"
        )
    return [Input(str(path), path.relative_to(folder).as_posix()) for path in known]


def _listed(path: Path) -> list[str]:
    """Names in a list: whole lines of a .txt, the first column of a .csv."""
    with open(path, newline="", encoding="utf-8-sig") as lines:
        rows = csv.reader(lines) if path.suffix.lower() == ".csv" else ([line] for line in lines)
        names = [row[0].strip() for row in rows if row]
    return [name for name in names if name]


def _listed_input(folder: Path, name: str) -> Input:
    return Input(name if "://" in name else str(folder / name), name)


def _remote_inputs(url: str) -> list[Input]:
    system, name = _filesystem(url)
    if not system.exists(name):
        raise MissingData(f"{url} does not exist")
    if not system.isdir(name):
        return [Input(url, PurePosixPath(name).name)]
    found = sorted(path for path in system.find(name))
    names = [path for path in found if is_video(Path(path)) or is_image(Path(path))]
    root = name.rstrip("/") + "/" if name.strip("/") else ""
    head, chain, rest = url.partition("::")
    scheme = head.split("://")[0]
    return [Input(f"{scheme}://{path}{chain}{rest}", path.removeprefix(root)) for path in names]


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
