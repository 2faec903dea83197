"""Files that later steps depend on: written atomically and protected by digests.

    write_atomically   bytes: readers see the old file or the whole new one
    write_json         a JSON object with its own digest; read_json refuses it when a byte changed
    naming             adds the path to errors of the system that lack it
    writing_into       names a folder that is removed while a command writes into it
    write_checksums    SHA256SUMS of a folder, or FILE.sha256 of one file, as `sha256sum -c` reads

This is the one owner of writing, hashing and reading such files. It lies in the lowest layer, since
all packages write some, and needs the standard library alone.
"""

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath

CHECKSUMS_NAME = "SHA256SUMS"
OWN_LISTING = ".sha256"  # added to the name of a file that lies among others that are not ours
DIGEST_KEY = "digest"
MAX_JSON_BYTES = 1 << 30  # a manifest of some 100 million samples' shards is far below
HASHED_AT_ONCE = 1 << 20  # bytes: large enough that the loop costs nothing beside the hash


class DamagedFile(ValueError):
    """A file that differs from what was written; the message names it and the fault."""


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file by a temporary one that is synced and renamed: readers see the old file or the
    whole new one.

    A write that fails before the rename (OSError with the path, for example on a full disk) leaves
    the old file and no temporary one; after it the new file stands. No error names the temporary.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path, instead_of=temporary):
            with open(temporary, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
    except BaseException:
        # on a full disk the partial file takes space that others need
        temporary.unlink(missing_ok=True)
        raise
    # the rename is an entry of the folder, which has to reach the disk as well
    with naming(path.parent):
        sync(path.parent)


@contextlib.contextmanager
def naming(path: Path, instead_of: Path | None = None) -> Iterator[None]:
    """Add the path to errors of the system: those of a write or a sync hold a number only. An error
    that names `instead_of`, a temporary file that nobody knows, names the path instead."""
    try:
        yield
    except OSError as error:
        # str: the error of a rename holds the Path itself, not its text
        is_unnamed = error.filename is None or str(error.filename) == str(instead_of)
        if error.errno is not None and is_unnamed:
            error.filename = str(path)
            if error.filename2 is not None:
                del error.filename2  # the second one of a rename; None would be printed
        raise


@contextlib.contextmanager
def writing_into(folder: Path) -> Iterator[None]:
    """Raise FileNotFoundError with the folder's path when the folder that a command writes into was
    removed; the original error would name some file in it."""
    try:
        yield
    except FileNotFoundError as error:
        if folder.is_dir():
            raise
        message = "it was removed while this command wrote into it; run the command again"
        raise FileNotFoundError(errno.ENOENT, message, str(folder)) from error


def sync(path: Path) -> None:
    """Force a file's bytes, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while piece := stream.read(HASHED_AT_ONCE):
            digest.update(piece)
    return digest.hexdigest()


def parse_json(data: bytes, name: str, max_bytes: int = MAX_JSON_BYTES) -> dict:
    """A JSON object of bytes that may be hostile: bounded size and depth, no duplicate key.

    Raises DamagedFile, which contains `name`, the file or sample.
    """
    if len(data) > max_bytes:
        raise DamagedFile(f"{name} has {len(data)} bytes of JSON, at most {max_bytes} are read")
    try:
        values = json.loads(data, object_pairs_hook=_once)
    # ValueError covers bytes that are no UTF-8; RecursionError is what deep nesting raises
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"{name} is no readable JSON ({error})") from error
    if not isinstance(values, dict):
        raise DamagedFile(f"{name} holds a {type(values).__name__}, not a JSON object")
    return values


def _once(pairs: list[tuple[str, object]]) -> dict:
    values = dict(pairs)
    # readers differ in which of two values they take
    if len(values) != len(pairs):
        raise ValueError("a key occurs twice")
    return values


def json_bytes(content: Mapping, indent: int | None = 1) -> bytes:
    """Bytes of a sealed JSON file: sorted keys, and under `digest` the sha256 of the object's text
    without that key.

    Raises ValueError for what would not be read back as it was written: NaN and infinity, which
    JSON does not have, keys that are no text, and content that has a `digest` already.

    indent: None puts everything on one line, for large files.
    """
    _check_keys(content)
    if DIGEST_KEY in content:
        raise ValueError(f"{DIGEST_KEY!r} is the key of the seal: give the content another name")
    digest = hashlib.sha256(_text(content, indent)).hexdigest()
    return _text({**content, DIGEST_KEY: digest}, indent)


def _check_keys(value: object) -> None:
    """ValueError for a key that is no text: JSON turns 9 and 10 into "9" and "10", which sort the
    other way round, so that the digest of what is read back differs."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise ValueError(f"a key of JSON is text, not {key!r}: write str(key)")
            _check_keys(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            _check_keys(inner)


def write_json(path: Path, content: Mapping) -> None:
    """Write a JSON object with its own digest, atomically."""
    write_atomically(path, json_bytes(content))


def read_json(path: Path, fields: Mapping[str, type | tuple[type, ...]]) -> dict:
    """The object that write_json wrote, without its digest.

    fields: required keys with their types (as of isinstance, but a bool is no int); other keys are
    allowed. Raises FileNotFoundError where there is no file, and DamagedFile for a file that
    differs from what was written in any byte, or lacks a field.
    """
    return parse_sealed_json(path.read_bytes(), name=str(path), fields=fields)


def parse_sealed_json(
    data: bytes, name: str, fields: Mapping[str, type | tuple[type, ...]]
) -> dict:
    """The same for bytes that were read already; `name` stands for them in messages."""
    content = open_seal(parse_json(data, name), data=data, name=name)
    check_fields(content, fields=fields, name=name)
    return content


def json_line(content: Mapping) -> bytes:
    """A line of a JSONL file, with its own digest."""
    return json_bytes(content, indent=None) + b"\n"


def parse_json_line(line: bytes, name: str) -> dict:
    """The object of such a line, without its digest; DamagedFile for a line that changed.

    A line without a digest is accepted, as older versions wrote such into the same files. No single
    damaged byte turns a line of ours into a different valid line.
    """
    line = line.rstrip(b"\n")
    content = parse_json(line, name)
    if DIGEST_KEY in content:
        return open_seal(content, data=line, name=name)
    for key, value in content.items():
        rest = {other: content[other] for other in content if other != key}
        # a line whose key `digest` itself was damaged must not pass for an older one
        if isinstance(value, str) and value == hashlib.sha256(_text(rest, None)).hexdigest():
            raise DamagedFile(f"{name} changed since it was written ({key!r} is no key of ours)")
    return content


def json_lines(
    path: Path, fields: Mapping[str, type | tuple[type, ...]]
) -> Iterator[tuple[str, dict]]:
    """(name of the line for messages, object) of each line of a file of JSON lines that others
    wrote, so without digests. Empty lines are skipped.

    DamagedFile for a line that is no JSON object or lacks a field.
    """
    with open(path, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            name = f"{path} line {number}"
            row = parse_json(line, name)
            check_fields(row, fields=fields, name=name)
            yield name, row


def open_seal(content: dict, data: bytes, name: str) -> dict:
    """An object that was parsed from `data`, without its digest. Raises DamagedFile when it has
    none, or when any byte differs from what was written."""
    if DIGEST_KEY not in content:
        raise DamagedFile(f"{name} has no digest: it was written by an older version or by hand")
    content = {key: value for key, value in content.items() if key != DIGEST_KEY}
    indent = 1 if data.startswith(b"{\n") else None
    try:
        written = json_bytes(content, indent)
    except (ValueError, RecursionError):
        # NaN, infinity and extreme depth, which can be parsed but are never written
        written = b""
    # comparing the whole text also finds changes without a meaning, such as other white space
    if written != data:
        raise DamagedFile(f"{name} changed since it was written (its digest differs)")
    return content


def check_fields(
    content: Mapping, fields: Mapping[str, type | tuple[type, ...]], name: str
) -> None:
    """Raise DamagedFile where a field is absent or of another type."""
    for key, kind in fields.items():
        if key not in content:
            raise DamagedFile(f"{name} has no {key!r}")
        value = content[key]
        kinds = kind if isinstance(kind, tuple) else (kind,)
        # True is an int for isinstance, and would pass as the number 1
        unwanted_bool = isinstance(value, bool) and bool not in kinds
        if unwanted_bool or not isinstance(value, kinds):
            names = " or ".join(one.__name__ for one in kinds)
            raise DamagedFile(f"{name}: {key!r} is {value!r:.80}, expected {names}")


def _text(content: Mapping, indent: int | None = 1) -> bytes:
    return json.dumps(content, indent=indent, sort_keys=True, allow_nan=False).encode()


def write_checksums(
    folder: Path, names: Iterable[str] | None = None, listing: str = CHECKSUMS_NAME
) -> None:
    """Write SHA256SUMS of the named files of a folder (default: all below it).

    `sha256sum -c SHA256SUMS` checks the same. Call it last, when no file changes any more.

    listing: name of the list, where one file has a list of its own.

    Raises ValueError for what `read_checksums` would refuse: no file at all, and a name with a
    backslash or a line break, which sha256sum writes in another form.
    """
    if names is None:
        files = (path for path in folder.rglob("*") if path.is_file())
        names = (path.relative_to(folder).as_posix() for path in files)
    listed = sorted(set(names) - {listing})  # a list cannot hold its own digest
    if not listed:
        raise ValueError(f"{folder} holds no file that {listing} could list")
    lines = []
    for name in listed:
        if not stays_below(name) or "\n" in name:
            raise ValueError(f"{name!r} in {folder} cannot stand in {listing}: rename the file")
        digest = file_sha256(folder / name)
        lines.append(f"{digest}  {name}\n")
    write_atomically(folder / listing, "".join(lines).encode())


def check_checksums(
    folder: Path, names: Iterable[str] | None = None, listing: str = CHECKSUMS_NAME
) -> bool:
    """Compare files of a folder with its SHA256SUMS; returns whether there is one.

    names: files that are about to be read; each must be listed, and only these are hashed (default:
    all listed ones). Raises DamagedFile that names every file that is absent, changed, or not
    listed.
    """
    path = folder / listing
    listed = read_checksums(path)
    if listed is None:
        return False
    wanted = sorted(listed if names is None else set(names))
    problems = []
    for name in wanted:
        if name not in listed:
            problems.append(f"{name} is not listed there")
        elif not (folder / name).is_file():
            problems.append(f"{name} is listed there and absent")
        elif file_sha256(folder / name) != listed[name]:
            problems.append(f"{name} changed since it was written (sha256 differs)")
    if problems:
        raise DamagedFile(
            f"{folder} is not as {path} says: {'; '.join(problems)}. Copy or export it again; if "
            f"the change is yours, remove {listing}"
        )
    return True


def read_checksums(path: Path) -> dict[str, str] | None:
    """{name: sha256} of a list in the format of sha256sum, None where there is no such file. Names
    are normalised: `sha256sum ./a` lists the file `a`.

    Raises DamagedFile for a line of another form, and for a name that leads out of the folder.
    """
    if not os.path.lexists(path):  # a folder or a dead link in its place is an error below
        return None
    listed: dict[str, str] = {}
    text = path.read_bytes().decode(errors="replace")
    # not splitlines: it also breaks at characters that names may have
    for line in text.removesuffix("\n").split("\n") if text else []:
        # after the digest stand two characters: two spaces, or " *" where sha256sum read bytes
        digest = line[:64]
        separator = line[64:66]
        name = line[66:]
        is_hexadecimal = set(digest) <= set("0123456789abcdef")
        is_digest = len(digest) == 64 and is_hexadecimal
        if not (is_digest and separator in ("  ", " *") and stays_below(name)):
            raise DamagedFile(
                f"{path} is damaged: {line!r:.100} is no line of sha256sum. Copy the files again, "
                "or remove this list to read them unchecked"
            )
        listed[str(PurePosixPath(name))] = digest
    if not listed:
        raise DamagedFile(f"{path} is empty, and was written with the names of files in it")
    return listed


def listing_of(path: Path) -> str:
    """Name of the checksum list of one file: `NAME.sha256` where that lies beside it, else
    SHA256SUMS of its folder."""
    own = f"{path.name}{OWN_LISTING}"
    return own if (path.parent / own).is_file() else CHECKSUMS_NAME


def is_plain_name(name: object) -> bool:
    """Whether a value is the name of a file in the same folder, without any path."""
    return isinstance(name, str) and stays_below(name) and "/" not in name


def stays_below(name: str) -> bool:
    """Whether a relative path, joined to a folder, names something below that folder: no absolute
    path, no `..`, nothing empty, no NUL, no backslash (a separator elsewhere). `./a` and `a//b` are
    other spellings of `a` and `a/b`. Links are not followed here."""
    parts = PurePosixPath(name).parts
    is_plain = bool(parts) and "\0" not in name and "\\" not in name
    return is_plain and not name.startswith("/") and ".." not in parts
