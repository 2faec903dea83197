"""Lists that give samples their labels, and what counts as a label. A label belongs to one sample.

    FILE.csv     lines of `relative path,label`: an integer, or a word where the reader takes words
    FILE.jsonl   lines of {"source": relative path, "labels": [integers]}

Every error names the file, the line and the value.
"""

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from model_factory.command_line.plain_text import printable

from .errors import DataPipelineError
from .shards.manifest import Manifest
from .text_lists import NUMBER, csv_rows, is_text, list_lines, settled_name

# What programs write for a truth value or for nothing: never the name of a class.
NO_WORDS = frozenset({"true", "false", "null", "nan", "na", "n/a"})
HEADERS = frozenset({"label", "labels", "class", "classes", "category", "target"})
SHOWN_CHARACTERS = 60  # of a wrong value in a message


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
    rows = []
    for row in csv_rows(path):
        cells = [cell.strip() for cell in row.cells]
        if len(cells) != 2 or not cells[0]:
            raise DataPipelineError(
                f"{row.place}: {_shown(row.cells)} is no `relative path,label` (several labels "
                "separated by spaces; a path with a comma in quotes)"
            )
        # "target" may be a class, but the name of a column has no ending.
        if not rows and cells[1].lower() in HEADERS and not Path(cells[0]).suffix:
            raise DataPipelineError(
                f"{row.place}: {_shown(row.cells)} is a header: remove that line"
            )
        found = LabelledRow(row.place, settled_name(cells[0], exists, row.place), cells[1])
        if found.numbers is None and not _is_word(found.label):
            raise DataPipelineError(f"{row.place}: label {_shown(cells[1])} is no integer or word")
        rows.append(found)
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


def read_labelled_jsonl(path: Path, ids: dict[str, int], others: set[str], num_classes: int):
    """{sample id: labels} of lines {"source": PATH, "labels": [..]}.

    ids: sample ids by source. others: sources whose lines are passed over, since packing rejected
    them. Raises DataPipelineError for a line of another form, a label that is no integer from 0 to
    num_classes - 1 (or -1 for none), a line for no sample, and a second line for one.
    """
    found: dict[int, list[int]] = {}
    lines: dict[str, str] = {}
    for place, line in list_lines(path):
        source, labels = _json_entry(place, line)
        source = settled_name(source, ids.__contains__, place)
        for label in labels:
            _check_class(label, place, num_classes)
        if source in lines:
            raise DataPipelineError(
                f"{place}: a second line for {printable(source)}, labels {_shown(labels)}; the "
                f"first is {lines[source]}: keep one"
            )
        lines[source] = place
        if source in ids:
            found[ids[source]] = labels
        elif source not in others:
            raise DataPipelineError(
                f"{place}: no sample is named {_shown(source)} (labels {_shown(labels)}): write "
                f"names as they were packed, e.g. {_shown(next(iter(ids), ''))}, or remove the line"
            )
    return found


def ids_of_sources(manifest: Manifest) -> dict[str, int]:
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
    source = entry.get("source") if isinstance(entry, dict) else None
    labels = entry.get("labels") if isinstance(entry, dict) else None
    if not isinstance(source, str) or not isinstance(labels, list):
        raise DataPipelineError(f'{place}: {_shown(line)} is no {{"source": PATH, "labels": [..]}}')
    return source, labels


def _check_class(label, place: str, num_classes: int) -> None:
    # type() and not isinstance(): True is an int to Python, and no class to anybody else.
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


def _shown(value) -> str:
    """A value as it would stand in JSON, cut to a bearable length."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (ValueError, RecursionError):
        text = f"a {type(value).__name__} that cannot be shown"
    text = printable(text)
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "..."
