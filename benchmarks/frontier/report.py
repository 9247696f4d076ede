"""The report on results/frontier.jsonl: pictures, frontier.html, and the sections of the pages."""

from __future__ import annotations

from pathlib import Path

from benchmarks.common import RESULTS, publish
from benchmarks.frontier import pictures
from benchmarks.frontier.aggregate import missing, points, split_of
from benchmarks.frontier.html import html_page
from benchmarks.frontier.plan import PLANNED, plan
from benchmarks.frontier.results import BENCHMARK, NAME, read
from benchmarks.frontier.sections import SECTIONS, headline
from benchmarks.pages import DOCS, write, written
from peft_safety.errors import DataError

HTML = f"{BENCHMARK}.html"
PICTURES = {
    "frontier.png": pictures.frontier,
    "frontier_poison.png": pictures.poison,
}


def page(out: Path) -> str:
    """frontier.html, of the results file and the pictures beside it.

    Raises:
        DataError: no results, or no picture.
    """
    environment, rows = read(out / NAME)
    shown, planned = points(rows), plan(list(PLANNED.values()))
    paths, poison = [out / name for name in PICTURES], headline(shown)
    if absent := [path.name for path in paths if not path.exists()]:
        raise DataError(f"{out} lacks {', '.join(absent)}. Run python -m benchmarks.report --pictures first.")
    return html_page(shown, environment, paths, split_of(rows), poison, missing(rows, planned), planned)


def report(out: Path = RESULTS, docs: Path | None = DOCS) -> None:
    """Write the pictures and frontier.html next to the results, and the sections of the pages.

    Raises:
        DataError: no results, or a page without markers. Nothing is written then.
    """
    shown = points(read(out / NAME)[1])
    headline(shown)  # an error without a finite cell
    pages = {} if docs is None else written(SECTIONS, out, docs)
    for name, draw in PICTURES.items():
        draw(shown, out / name)
    publish(out / HTML, page(out))
    write(pages)
    print(f"wrote {out / HTML}, {', '.join(PICTURES)}" + "".join(f", {path}" for path in pages))
