"""Documents: every link leads to a file and a heading that exist, every guide is on the site."""

import re

import pytest
from conftest import ROOT

DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    ROOT / "model_factory" / "README_PACKING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"```.*?```|`[^`\n]*`", re.S)


def anchors(text: str) -> set[str]:
    """What links to headings of a Markdown text may name, as code hosts and MkDocs make them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.strip().replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_of_a_document_lead_somewhere(document):
    for link in LINK.findall(CODE.sub("", document.read_text())):
        path, _, anchor = link.partition("#")
        if ":" in path:
            continue
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), f"{document.name} links to {link}"
        if anchor:
            assert anchor in anchors(target.read_text()), f"{document.name} links to {link}"


def test_every_guide_is_in_the_navigation_of_the_site():
    navigation = (ROOT / "docs" / "hooks.py").read_text()
    for guide in (ROOT / "docs").glob("*.md"):
        assert f'"{guide.stem}"' in navigation, f"docs/hooks.py does not name {guide.name}"


def test_pictures_of_documents_are_small_and_have_their_command():
    described = (ROOT / "docs" / "images" / "README.md").read_text()
    for picture in (ROOT / "docs" / "images").iterdir():
        if picture.suffix != ".md":
            assert f"`{picture.name}`" in described
            assert picture.stat().st_size < 500_000  # what the pre-commit hook lets through
