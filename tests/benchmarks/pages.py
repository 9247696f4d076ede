"""Pages with nothing but the markers of some sections."""

from collections.abc import Iterable
from pathlib import Path

from benchmarks.pages import Section


def blank(docs: Path, sections: Iterable[Section]) -> Path:
    """The folder, with a page for each section's page."""
    for section in sections:
        page = docs / section.page
        page.parent.mkdir(parents=True, exist_ok=True)
        old = page.read_text(encoding="utf-8") if page.is_file() else "before\n"
        page.write_text(old + "\nSTALE\n".join(section.markers) + "\nafter\n", encoding="utf-8")
    return docs
