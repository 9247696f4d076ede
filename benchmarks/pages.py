"""Sections of the documents that benchmarks write from their results files, between markers."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import RESULTS, publish
from peft_safety.errors import DataError

DOCS = Path(__file__).parents[1] / "docs"


@dataclass(frozen=True)
class Section:
    """A part of a page, between `<!-- name:begin -->` and `<!-- name:end -->`.

    Attributes:
        page: file of the page, from `docs`.
        text: of the folder of results files and the path of the page: the section, as markdown.
    """

    name: str
    page: str
    text: Callable[[Path, Path], str]

    @property
    def markers(self) -> tuple[str, str]:
        return f"<!-- {self.name}:begin -->", f"<!-- {self.name}:end -->"

    def put(self, page: str, where: Path, results: Path) -> str:
        """The text of a page with this section in place of the old one.

        Raises:
            DataError: the page does not have each marker once, or there are no results.
        """
        begin, end = self.markers
        if page.count(begin) != 1 or page.count(end) != 1:
            raise DataError(f"{where} lacks the markers {begin} and {end}. Put them where the table belongs.")
        new = f"{begin}\n{self.text(results, where).strip()}\n{end}"
        return re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: new, page, flags=re.DOTALL)


def written(sections: Iterable[Section], results: Path = RESULTS, docs: Path = DOCS) -> dict[Path, str]:
    """The pages of some sections as they have to be. Only the results files decide what the sections say.

    Raises:
        DataError: no results, or a page without markers.
    """
    pages: dict[Path, str] = {}
    for section in sections:
        where = docs / section.page
        text = pages.get(where) or where.read_text(encoding="utf-8")
        pages[where] = section.put(text, where, results)
    return pages


def write(pages: dict[Path, str]) -> None:
    """Put pages in their places."""
    for where, text in pages.items():
        publish(where, text)


def link(path: Path, page: Path) -> str:
    """The path of a file as a link on a page."""
    return Path(os.path.relpath(path, page.parent)).as_posix()
