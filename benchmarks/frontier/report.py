"""The report on results/frontier.jsonl: pictures, frontier.html, and a section of the results page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import PAGE, RESULTS, link, publish, with_section
from benchmarks.frontier import pictures, tables
from benchmarks.frontier.aggregate import Points, missing, points, shares, split_of
from benchmarks.frontier.html import html_page
from benchmarks.frontier.plan import FIRST_POISON, PLANNED, plan
from benchmarks.frontier.results import NAME, OTHERS, Row, caveats, facts, read, results_of
from peft_safety.errors import DataError
from peft_safety.evaluation import KeywordJudge

MARKERS = ("<!-- frontier:begin -->", "<!-- frontier:end -->")
PICTURES = {
    "frontier.png": pictures.frontier,
    "frontier_poison.png": pictures.poison,
    "frontier_costs.png": pictures.costs,
}


def section(results: Path, page: Path = PAGE) -> str:
    """The section of the page, as markdown. Only the results file decides what it says.

    Raises:
        DataError: no results, or none that are finite.
    """
    environment, rows = read(results)
    shown = points(rows)
    poison = _headline(shown)
    split, planned = split_of(rows), plan(list(PLANNED.values()))
    absent = sum(missing(rows, planned).values())
    table = tables.headline(shown, poison)
    tried = tables.settings(rows) if split == "test" else None
    folder = results.parent
    others = tables.other_tasks({t: read(p)[1] for t in OTHERS if (p := folder / f"{results_of(t)}.jsonl").is_file()})
    seeds = sorted({row["cell"]["seed"] for row in rows if row["cell"]["arm"] != "aligned"})
    picture = link(results.parent / "frontier.png", page)
    lines = [
        f"![refusal against accuracy, a panel a share of poison, controls hollow]({picture})",
        "",
        *table.markdown(),
        "",
        *([*tried.markdown(), ""] if tried is not None else []),
        *([*others.markdown(), ""] if others is not None else []),
        *(f"- **{caveat}**" for caveat in caveats(environment)),
        f"- {split} prompts, seeds {', '.join(map(str, seeds))}; brackets after a rate are 95 % intervals over "
        "prompts, pooled over seeds. Judge: keyword. "
        f"{KeywordJudge.caveat}",
        "- Against its controls: points of refusal on the same harmful prompts of all sets, in brackets the prompts "
        "on which only the method, only the control "
        "refuses, and McNemar's exact p (prompts repeat over seeds, so it is somewhat too small).",
        f"- {len(planned) - absent} of the {len(planned)} cells of the full plan; everything else, and what is "
        "missing, in `benchmarks/results/frontier.html`.",
        f"- Cells by device: {devices(rows)}. Environment of the report: {facts(environment)}.",
        "- Written by `python -m benchmarks.frontier --report` (`benchmarks/results/frontier.jsonl`).",
    ]
    if split != "test":
        lines.insert(2, "**Validation prompts only: nothing here is a result.**\n")
    return "\n".join(lines)


def devices(rows: Sequence[Row]) -> str:
    """How many cells ran on which device."""
    counts = Counter(row.get("device", "cpu") for row in rows)
    return ", ".join(f"{device} {count}" for device, count in counts.most_common())


def _headline(shown: Points) -> float:
    """The share of poison that the report is about."""
    measured = shares(shown)
    if not measured or not any(point.rows for point in shown.values()):
        raise DataError("no finite cell to report on. Run python -m benchmarks.frontier first.")
    return FIRST_POISON if FIRST_POISON in measured else measured[0]


def report(out: Path = RESULTS, page: Path | None = PAGE) -> None:
    """Write the pictures and frontier.html next to the results, and the section of the page.

    Raises:
        DataError: no results, or a page without markers. Nothing is written then.
    """
    environment, rows = read(out / NAME)
    shown = points(rows)
    poison, planned = _headline(shown), plan(list(PLANNED.values()))
    text = None if page is None else with_section(page, MARKERS, section(out / NAME, page))
    paths = [draw(shown, out / name) for name, draw in PICTURES.items()]
    html = html_page(shown, environment, paths, split_of(rows), poison, missing(rows, planned), planned)
    publish(out / "frontier.html", html)
    if page is not None and text is not None:
        publish(page, text)
    print(
        f"wrote {out / 'frontier.html'}, {', '.join(path.name for path in paths)}"
        + (f" and the section of {page}" if page else "")
    )
