"""Pages of the site that are not files of docs/, and its navigation.

    index, CONTRIBUTING, CHANGELOG, records of benchmarks, the packing guide   as they stand in
        the repository
    reference/PACKAGE/MODULE   one page per module of the four packages, from its docstrings

Docstrings are plain text, not Markdown, so what Markdown would read as a link or a tag is escaped.
Links between files of the repository become links between pages; a link to a file that has no page
(a script, a test) becomes its name. So the same text reads well on a code host and on the site, and
a module that moves takes its page along.
"""

import posixpath
import re
from pathlib import Path

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
PACKAGES = ("data_pipeline", "model_factory", "training", "eval_encoder")
GUIDES = (
    ("Data", ("data_format", "clustering", "loading")),
    ("Training", ("configuration", "checkpoint", "scaling")),
    ("Evaluation", ("evaluation", "evidence", "llava")),
    ("Project", ("architecture", "extending", "testing")),
)
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
FENCE = re.compile(r"(```.*?```|`[^`\n]+`)", re.S)


def copied() -> dict[str, str]:
    """Files of the repository that are pages: path in the repository -> path on the site."""
    pages = {"README.md": "index.md"}
    for name in ("CONTRIBUTING.md", "CHANGELOG.md", "model_factory/README_PACKING.md"):
        pages[name] = name
    for record in sorted((ROOT / "benchmarks" / "results").glob("*.md")):
        pages[str(record.relative_to(ROOT))] = f"benchmarks/{record.name}"
    return pages


def modules() -> dict[str, str]:
    """Modules of the packages: path in the repository -> path of its page on the site."""
    pages = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            inside = path.relative_to(ROOT)
            page = inside.with_name("index") if path.name == "__init__.py" else inside
            pages[str(inside)] = f"reference/{page.with_suffix('.md').as_posix()}"
    return pages


def on_config(config):
    """The navigation, from what lies in the folders."""
    guides = [{title: [f"{name}.md" for name in names]} for title, names in GUIDES]
    records = [page for path, page in copied().items() if path.startswith("benchmarks/")]
    config.nav = [
        {"Home": "index.md"},
        {"Guides": [*guides, {"Packing guide": "model_factory/README_PACKING.md"}]},
        {"Results": [{_record_title(page): page} for page in records]},
        {"Reference": [_branch(f"reference/{package}/") for package in PACKAGES]},
        {"About": ["CONTRIBUTING.md", "CHANGELOG.md", {"Pictures": "images/README.md"}]},
    ]
    return config


def _record_title(page: str) -> str:
    return Path(page).stem.split("_cpu")[0].replace("_", " ").capitalize()


def _branch(folder: str) -> dict:
    """A folder of the reference with its page, its modules, then its folders."""
    pages = sorted(page for page in modules().values() if page.startswith(folder))
    inside = [page.removeprefix(folder) for page in pages]
    below = sorted({page.split("/")[0] for page in inside if "/" in page})
    own = [f"{folder}{page}" for page in inside if "/" not in page]
    own.sort(key=lambda page: not page.endswith("/index.md"))  # a folder's own page comes first
    named = [page if page.endswith("/index.md") else {Path(page).stem: page} for page in own]
    name = folder.rstrip("/").rsplit("/", 1)[-1]
    return {name: [*named, *(_branch(f"{folder}{child}/") for child in below)]}


def on_files(files, config):
    """Add the pages that are no files of docs/."""
    for path, page in copied().items():
        text = (ROOT / path).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    for path, page in modules().items():
        dotted = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        files.append(File.generated(config, page, content=f"# {dotted}\n\n::: {dotted}\n"))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turn links between files of the repository into links between pages."""
    here = page.file.src_uri
    sources = {site: path for path, site in copied().items()}
    base = posixpath.dirname(sources.get(here, f"docs/{here}"))
    if here.startswith("reference/"):
        return markdown
    parts = FENCE.split(markdown)
    for number in range(0, len(parts), 2):  # the odd ones are code
        parts[number] = LINK.sub(lambda found: _link(found, base, here), parts[number])
    return "".join(parts)


def _link(found: re.Match, base: str, here: str) -> str:
    picture, text, target = found.groups()
    path, _, anchor = target.partition("#")
    if ":" in path or not path:
        return found.group()
    inside = posixpath.normpath(posixpath.join(base, path))
    pages = {**copied(), **modules()}
    site = pages.get(inside) or pages.get(f"{inside}/__init__.py")
    if site is None and inside.startswith("docs/") and (ROOT / inside).is_file():
        site = inside.removeprefix("docs/")
    if site is None:
        if not (ROOT / inside).exists():
            return found.group()  # mkdocs warns of it, so that the build fails
        return text
    relative = posixpath.relpath(site, posixpath.dirname(here) or ".")
    return f"{picture}[{text}]({relative}{'#' if anchor else ''}{anchor})"


class PlainDocstrings(griffe.Extension):
    """Escapes in docstrings what is no markup there: `[#RANK][xN]` is no link, `<image>` no tag."""

    def on_object(self, *, obj, **_):
        if obj.docstring:
            lines = obj.docstring.value.split("\n")
            # indented lines are code, where an escape would be shown
            escaped = [line if line.startswith("    ") else _plain(line) for line in lines]
            obj.docstring.value = "\n".join(escaped)


def _plain(line: str) -> str:
    parts = line.split("`")
    for number in range(0, len(parts), 2):  # the odd ones are inline code
        parts[number] = parts[number].replace("][", "]\\[").replace("<", "&lt;")
    return "`".join(parts)
