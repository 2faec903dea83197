"""Escaping of names that come from data, for terminals, Markdown, web pages and plots.

A file, class or cluster may have any name: an escape sequence that clears the screen, a line break
that forges a row of a table, `<script>`. All code that shows such a name passes it through here.

    printable     a terminal, a message       in_markdown, in_code   report.md, cards, tables
    show          print of it                 in_html                a page
    PlainFormatter   log lines                in_plot                legends of matplotlib
"""

import html
import logging
import re
import sys
import unicodedata

# Cc controls, Cf invisible marks (those that turn the direction of text among them), Cs halves of
# pairs (how Python keeps bytes of a file name that are no UTF-8), Zl and Zp line breaks
UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
LINES = "\n"
# prose has line breaks and tabs, and Persian, Indic scripts and emoji need the two joiners
RUNNING = "\n\t\u200c\u200d"
MARKDOWN = re.compile(r"([\\`*_\[\]|#~!])")


def printable(text: object, keep: str = "") -> str:
    """One line in which every character is visible: control and invisible characters become escapes
    such as \\x1b.

    keep: characters that stay, such as LINES for texts with line breaks of their own, and RUNNING
    for prose.
    """
    visible = [c if c in keep else _escaped(c) for c in str(text)]
    return "".join(visible)


def _escaped(character: str) -> str:
    if unicodedata.category(character) not in UNSEEN:
        return character
    return character.encode("unicode_escape", "surrogatepass").decode()


def show(text: object, error: bool = False) -> None:
    """Print a text with its own line breaks, to standard error if `error`."""
    print(printable(text, keep=LINES), file=sys.stderr if error else sys.stdout, flush=True)


class PlainFormatter(logging.Formatter):
    """A formatter of log lines, tracebacks included, in which every character is visible."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, or the lines of a message with line breaks."""
        return printable(super().format(record), keep=LINES)


def in_markdown(text: object) -> str:
    """The same for Markdown, also inside a table: markup in the text is shown, not interpreted."""
    escaped = html.escape(printable(text), quote=False)
    return MARKDOWN.sub(r"\\\1", escaped)


def in_code(text: object) -> str:
    """The same as inline code of Markdown, outside of tables. The fence has more backticks than the
    text has in a row."""
    shown = printable(text)
    runs = re.findall("`+", shown)
    longest = max(map(len, runs), default=0)
    fence = "`" * (1 + longest)
    # the spaces separate the fence from backticks of the text; Markdown drops them again
    return f"{fence} {shown} {fence}" if longest else f"`{shown}`"


def in_plot(text: object) -> str:
    """The same for texts of matplotlib, which interprets formulas between dollar signs."""
    return printable(text).replace("$", r"\$")


def in_html(text: object, keep: str = "") -> str:
    """The same for HTML, as text or as the value of an attribute; `keep` as in printable."""
    return html.escape(printable(text, keep), quote=True)
