"""The README is short; links and paths in the documents lead somewhere, and the index has every page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.pages import DOCS, PAGES, README, ROOT, name

LONGEST_README = 900


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").split()) <= LONGEST_README


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")) if "://" not in link]
    for link in links:
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_paths_in_the_text_exist() -> None:
    """Of code in backticks, what looks like a path: from the root, from the package, or beside the page."""
    pages = [*PAGES, ROOT / "CHANGELOG.md", *sorted((ROOT / "examples").rglob("*.md"))]
    seen = 0
    for page in pages:
        for path in re.findall(r"`([\w.-]*/[\w./-]*(?:/|\.\w+)|[\w.-]+\.py)`", page.read_text(encoding="utf-8")):
            places = (ROOT, ROOT / "peft_safety", page.parent)
            assert any((place / path).exists() for place in places), f"{name(page)}: {path}"
            seen += 1
    assert seen > 20, "paths are seen"


def test_every_page_is_in_the_index() -> None:
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    pages = [page.relative_to(DOCS).as_posix() for page in PAGES if DOCS in page.parents]
    assert [page for page in pages if f"]({page})" not in index] == ["README.md"]
