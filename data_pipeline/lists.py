"""Lists that people wrote: of files, and of the labels of samples. A label belongs to one sample.

    FILE.txt     a name per line
    FILE.csv     lines of `relative path,label`: an integer, or a word where the reader takes words
    FILE.jsonl   lines of {"source": relative path, "labels": [integers]}

UTF-8 with or without a mark, and UTF-16 with one, are read as they are. Other bytes are kept (as
surrogate escapes, which lose nothing) until `settled_name` finds the file that they name: no
encoding is guessed where nothing on disk proves it. Every error names the file, the line and the
value.
"""

import codecs
import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from model_factory.command_line.plain_text import printable

from .errors import DataPipelineError, MissingData

if TYPE_CHECKING:
    from .shards.manifest import Manifest

# A class or an index. Nine digits fit the int32 of labels.npy. Not str.isdigit(), which takes "²",
# an error to int().
NUMBER = re.compile(r"[0-9]{1,9}")
# Both, since they differ at 0x80 to 0x9f, where Windows has letters and Latin-1 control characters.
OLD_ENCODINGS = ("latin-1", "cp1252")
# What programs write for a truth value or for nothing: never the name of a class.
NO_WORDS = frozenset({"true", "false", "null", "nan", "na", "n/a"})
HEADERS = frozenset({"label", "labels", "class", "classes", "category", "target"})
SHOWN_CHARACTERS = 60  # of a wrong value in a message


@dataclass(frozen=True)
class Row:
    """Cells of one row of a CSV file."""

    place: str  # FILE line N, where the row begins
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
                yield Row(place=f"{path} line {first_line}", cells=cells)
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


@dataclass(frozen=True)
class LabelledRow:
    """A line of a CSV list: where it stands, the sample it names, and the text of its label."""

    place: str
    name: str
    label: str

    @property
    def numbers(self) -> list[int] | None:
        """The label as integers separated by spaces, [] where it is empty; None for a word."""
        parts = self.label.split()
        return [int(part) for part in parts] if all(map(NUMBER.fullmatch, parts)) else None


def read_labelled_csv(path: Path, exists: Callable[[str], bool]) -> list[LabelledRow]:
    """Rows of a list of `relative path,label`. `exists` decides on names that are no UTF-8.

    Raises DataPipelineError for a line of another form and for a label that is no integer or word.
    """
    rows: list[LabelledRow] = []
    for row in csv_rows(path):
        cells = [cell.strip() for cell in row.cells]
        if len(cells) != 2 or not cells[0]:
            raise DataPipelineError(
                f"{row.place}: {_shown(row.cells)} is no `relative path,label` (several labels "
                "separated by spaces; a path with a comma in quotes)"
            )
        # "target" may be a class, but the name of a column has no ending.
        names_columns = cells[1].lower() in HEADERS and not Path(cells[0]).suffix
        if not rows and names_columns:
            raise DataPipelineError(
                f"{row.place}: {_shown(row.cells)} is a header: remove that line"
            )
        name = settled_name(cells[0], exists=exists, place=row.place)
        labelled = LabelledRow(place=row.place, name=name, label=cells[1])
        if labelled.numbers is None and not _is_word(cells[1]):
            raise DataPipelineError(f"{row.place}: label {_shown(cells[1])} is no integer or word")
        rows.append(labelled)
    if not rows:
        raise DataPipelineError(f"{path} lists nothing")
    return rows


def refuse_repeats(rows: Iterable[LabelledRow], remedy: str) -> None:
    """DataPipelineError where two lines label one sample; it names both lines and both labels."""
    first: dict[str, LabelledRow] = {}
    for row in rows:
        before = first.setdefault(os.path.normpath(row.name), row)  # ./a.mp4 is a.mp4
        if before is not row:
            raise DataPipelineError(
                f"{row.place}: {printable(row.name)} has label {_shown(row.label)} here and "
                f"{_shown(before.label)} in {before.place}: {remedy}"
            )


def read_labelled_jsonl(
    path: Path, ids: dict[str, int], others: set[str], num_classes: int
) -> dict[int, list[int]]:
    """{sample id: labels} of lines {"source": PATH, "labels": [..]}.

    ids: sample ids by source. others: sources whose lines are passed over, since packing rejected
    them. Raises DataPipelineError for a line of another form, a label that is no integer from 0 to
    num_classes - 1 (or -1 for none), a line for no sample, and a second line for one.
    """
    labels_of: dict[int, list[int]] = {}
    lines: dict[str, str] = {}
    for place, line in list_lines(path):
        source, labels = _json_entry(place, line)
        source = settled_name(source, exists=ids.__contains__, place=place)
        for label in labels:
            _check_class(label, place=place, num_classes=num_classes)
        if source in lines:
            raise DataPipelineError(
                f"{place}: a second line for {printable(source)}, labels {_shown(labels)}; the "
                f"first is {lines[source]}: keep one"
            )
        lines[source] = place
        if source in ids:
            labels_of[ids[source]] = labels
        elif source not in others:
            raise DataPipelineError(
                f"{place}: no sample is named {_shown(source)} (labels {_shown(labels)}): write "
                f"names as they were packed, e.g. {_shown(next(iter(ids), ''))}, or remove the line"
            )
    return labels_of


def ids_of_sources(manifest: "Manifest") -> dict[str, int]:
    """{source: sample id} of a packed folder.

    Raises DataPipelineError where two samples have one name, so that a line for it could mean
    either.
    """
    ids: dict[str, int] = {}
    for number, source in enumerate(manifest.sources()):
        if ids.setdefault(source, number) != number:
            raise DataPipelineError(
                f"samples {ids[source]} and {number} of {manifest.directory} are both named "
                f"{printable(source)}, so a label for that name could mean either: pack the inputs "
                "again, which names them apart"
            )
    return ids


def _json_entry(place: str, line: str) -> tuple[str, list]:
    """(source, labels) of a line, the labels not yet checked."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataPipelineError(f"{place} is no JSON ({error}): {_shown(line)}") from error
    if not isinstance(entry, dict):
        entry = {}
    source = entry.get("source")
    labels = entry.get("labels")
    if not isinstance(source, str) or not isinstance(labels, list):
        raise DataPipelineError(f'{place}: {_shown(line)} is no {{"source": PATH, "labels": [..]}}')
    return source, labels


def _check_class(label: object, place: str, num_classes: int) -> None:
    # type() and not isinstance(): True is an int to Python, and a mistake in a list of labels.
    if type(label) is not int:
        raise DataPipelineError(
            f"{place}: label {_shown(label)} is no integer: classes are the integers from 0 to "
            f"{num_classes - 1}"
        )
    if not -1 <= label < num_classes:
        raise DataPipelineError(
            f"{place}: label {_shown(label)}, but classes are 0 to {num_classes - 1} and -1 for "
            "none"
        )


def _is_word(label: str) -> bool:
    if not is_text(label) or not label.isprintable() or label.lower() in NO_WORDS:
        return False
    try:
        float(label)  # 1.9, 1e3, inf: numbers that are no class
    except ValueError:
        return any(character.isalpha() for character in label)
    return False


def _shown(value: object) -> str:
    """A value as it would stand in JSON, cut to a bearable length."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (ValueError, RecursionError):
        text = f"a {type(value).__name__} that cannot be shown"
    text = printable(text)
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "..."
