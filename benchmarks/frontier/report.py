"""The report on results/frontier.jsonl: pictures, frontier.html, and the sections of the pages."""

from __future__ import annotations

from pathlib import Path

from benchmarks.common import RESULTS, publish
from benchmarks.frontier import pictures
from benchmarks.frontier.aggregate import missing, points, split_of
from benchmarks.frontier.html import html_page
from benchmarks.frontier.plan import PLANNED, plan
from benchmarks.frontier.results import NAME, read
from benchmarks.frontier.sections import SECTIONS, headline
from benchmarks.pages import DOCS, write, written

PICTURES = {
    "frontier.png": pictures.frontier,
    "frontier_poison.png": pictures.poison,
}


def report(out: Path = RESULTS, docs: Path | None = DOCS) -> None:
    """Write the pictures and frontier.html next to the results, and the sections of the pages.

    Raises:
        DataError: no results, or a page without markers. Nothing is written then.
    """
    environment, rows = read(out / NAME)
    shown = points(rows)
    poison, planned = headline(shown), plan(list(PLANNED.values()))
    pages = {} if docs is None else written(SECTIONS, out, docs)
    paths = [draw(shown, out / name) for name, draw in PICTURES.items()]
    html = html_page(shown, environment, paths, split_of(rows), poison, missing(rows, planned), planned)
    publish(out / "frontier.html", html)
    write(pages)
    names = ", ".join(path.name for path in paths)
    print(f"wrote {out / 'frontier.html'}, {names}" + "".join(f", {page}" for page in pages))
