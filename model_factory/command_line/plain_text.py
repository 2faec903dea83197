"""Names that came with data, made safe to show: in a terminal, in Markdown, in a page.

A file, class or cluster may be called anything: an escape sequence that clears the screen, a line
break that forges a row of a table, `<script>`. Whatever shows such a name passes it through here.

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
    """One line that shows every character: what would act or stay invisible becomes an escape such
    as \\x1b.

    keep: characters that stay as they are, such as LINES where the text's own line breaks shall
    count, and RUNNING for what somebody wrote as prose.
    """
    return "".join(c if c in keep else _escaped(c) for c in str(text))


def _escaped(character: str) -> str:
    if unicodedata.category(character) not in UNSEEN:
        return character
    return character.encode("unicode_escape", "surrogatepass").decode()


def show(text: object, error: bool = False) -> None:
    """Print a text whose own line breaks count, to standard error if `error`."""
    print(printable(text, keep=LINES), file=sys.stderr if error else sys.stdout, flush=True)


class PlainFormatter(logging.Formatter):
    """A formatter of log lines, tracebacks included, that shows what would act as escapes."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, or lines where the message has some."""
        return printable(super().format(record), keep=LINES)


def in_markdown(text: object) -> str:
    """The same for Markdown, also inside of a table: shown as typed, never read as markup."""
    escaped = html.escape(printable(text), quote=False)
    return MARKDOWN.sub(r"\\\1", escaped)


def in_code(text: object) -> str:
    """The same as inline code of Markdown, outside of tables: between more backticks than it has in
    a row."""
    shown = printable(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    # a space inside of the fence is dropped again, and parts it from backticks of the text
    return f"{fence} {shown} {fence}" if len(fence) > 1 else f"`{shown}`"


def in_plot(text: object) -> str:
    """The same for texts of matplotlib, which reads formulas between dollars."""
    return printable(text).replace("$", r"\$")


def in_html(text: object, keep: str = "") -> str:
    """The same for HTML, as text or as the value of an attribute; `keep` as in printable."""
    return html.escape(printable(text, keep), quote=True)
