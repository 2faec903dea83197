"""Names that came with data, made safe to show: in a terminal, in Markdown, in a page.

A file, class or cluster may be called anything: an escape sequence that clears the screen, a line
break that forges a row of a table, `<script>`. Whatever shows such a name passes it through here.
"""

import html
import re
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


def in_markdown(text: object) -> str:
    """The same for Markdown, also inside of a table: shown as typed, never read as markup."""
    escaped = html.escape(printable(text), quote=False)
    return MARKDOWN.sub(r"\\\1", escaped)


def in_html(text: object, keep: str = "") -> str:
    """The same for HTML, as text or as the value of an attribute; `keep` as in printable."""
    return html.escape(printable(text, keep), quote=True)
