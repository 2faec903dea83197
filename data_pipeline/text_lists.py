"""Lists that people wrote: bytes of a file -> lines and rows that know where they stand.

UTF-8 with or without a mark, and UTF-16 with one, are read as they are. Other bytes are kept (as
surrogate escapes, which lose nothing) until `settled_name` finds the file that they name: no
encoding is guessed where nothing on disk proves it.
"""

import codecs
import csv
import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from model_factory.command_line.plain_text import printable

from .errors import DataPipelineError, MissingData

# A class or an index. Nine digits fit the int32 of labels.npy. Not str.isdigit(), which takes "²",
# an error to int().
NUMBER = re.compile(r"[0-9]{1,9}")
# Both, since they differ at 0x80 to 0x9f, where Windows has letters and Latin-1 control characters.
OLD_ENCODINGS = ("latin-1", "cp1252")


@dataclass(frozen=True)
class Row:
    """Cells of one row and where it begins."""

    place: str  # FILE line N
    cells: list[str]


def list_lines(path: Path) -> Iterator[tuple[str, str]]:
    """(`FILE line N`, line without its end) of every line that is not blank."""
    # Not str.splitlines(), which also splits at characters that names may hold (U+2028, U+0085).
    for number, line in enumerate(io.StringIO(_read_text(path), newline=None), start=1):
        if line.strip():
            yield f"{path} line {number}", line.rstrip("\n")


def csv_rows(path: Path) -> Iterator[Row]:
    """Rows of a CSV file that are not blank. DataPipelineError for an open quote and the like."""
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), strict=True)
    first_line = 1
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield Row(f"{path} line {first_line}", cells)
            first_line = reader.line_num + 1
    except csv.Error as error:
        raise DataPipelineError(f"{path} line {first_line} is no CSV: {error}") from error


def settled_name(name: str, exists: Callable[[str], bool], place: str) -> str:
    """The name that a line means: itself, or what its bytes are in Latin-1 where that exists.

    Raises DataPipelineError with the line where the bytes are no UTF-8 and nothing has the name.
    """
    if is_text(name):
        return name
    raw = name.encode("utf-8", "surrogateescape")
    decoded = [raw.decode(encoding, "replace") for encoding in OLD_ENCODINGS]
    for candidate in (name, *decoded):
        if exists(candidate):
            return candidate
    raise DataPipelineError(
        f"{place}: '{printable(name)}' is no UTF-8, and nothing has that name, neither with these "
        "bytes nor read as Latin-1: save the list as UTF-8"
    )


def is_text(name: str) -> bool:
    """Whether a string came from valid UTF-8."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise MissingData(f"{path} does not exist, or is no file: give a list")
    data = path.read_bytes()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        try:
            text = data.decode("utf-16")
        except UnicodeDecodeError as error:
            raise DataPipelineError(
                f"{path} is damaged UTF-16 ({error}): save it as UTF-8"
            ) from error
    else:
        text = data.decode("utf-8-sig", "surrogateescape")
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataPipelineError(
            f"{path} line {line} holds a NUL byte, so it is no text list, or one in UTF-16 or "
            "UTF-32: save it as UTF-8"
        )
    return text
