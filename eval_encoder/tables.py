"""Markdown tables of both probes.

Cells may hold names that came with data, such as folders and classes. All cells are escaped, so
that no name can forge a row or a heading (model_factory/command_line/plain_text.py).
"""

from collections.abc import Collection, Iterable

from model_factory.command_line.plain_text import in_markdown


def markdown_table(
    columns: Collection[str],
    rows: Iterable[Iterable[object]],
    right_aligned: Collection[str] = (),
) -> str:
    """A table, with a line break at its end. right_aligned: names of columns of numbers."""
    return table_head(columns, right_aligned) + "".join(table_row(row) for row in rows)


def table_head(columns: Collection[str], right_aligned: Collection[str] = ()) -> str:
    """The two lines above the rows: names and alignment."""
    alignment = ["---:" if column in right_aligned else "---" for column in columns]
    return f"{table_row(columns)}| {' | '.join(alignment)} |\n"


def table_row(cells: Iterable[object]) -> str:
    """One line, so that rows can also be appended to a table that is a file."""
    return f"| {' | '.join(map(in_markdown, cells))} |\n"
