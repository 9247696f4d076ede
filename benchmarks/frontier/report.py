"""From results/frontier.jsonl to the pictures, the page, and the section of docs/results.md."""

from __future__ import annotations

from pathlib import Path

from benchmarks.common import RESULTS, with_section
from benchmarks.frontier import pictures, tables
from benchmarks.frontier.aggregate import missing, points, shares, split_of
from benchmarks.frontier.cache import publish
from benchmarks.frontier.cells import caveats
from benchmarks.frontier.html import page
from benchmarks.frontier.plan import FIRST_POISON, METHODS, plan
from benchmarks.frontier.results import NAME, read
from peft_safety.errors import DataError
from peft_safety.evaluation import KeywordJudge

PAGE = Path(__file__).resolve().parents[2] / "docs" / "results.md"
MARKERS = ("<!-- frontier:begin -->", "<!-- frontier:end -->")
PICTURES = {
    "frontier.png": pictures.frontier,
    "frontier_heat.png": pictures.heat,
    "frontier_costs.png": pictures.costs,
}


def section(results: Path) -> str:
    """What stands between the page's markers; decided by the results file alone.

    Raises:
        DataError: no results, or none that are finite.
    """
    environment, rows = read(results)
    found = points(rows)
    poison = _headline(found)
    split, planned = split_of(rows), plan(list(METHODS.values()))
    gone = sum(missing(rows, planned).values())
    table = tables.headline(found, poison)
    seeds = sorted({row["cell"]["seed"] for row in rows if row["cell"]["arm"] != "aligned"})
    facts = ", ".join(
        f"{key} {value}" for key, value in environment.items() if value not in ("", {}) and key != "sets"
    )
    lines = [
        "![refusal against accuracy, a panel a share of poison, controls hollow](../benchmarks/results/frontier.png)",
        "",
        *table.markdown(),
        "",
        *(f"- **{caveat}**" for caveat in caveats(environment)),
        f"- {split} prompts, seeds {', '.join(map(str, seeds))}; brackets after a rate are 95 % intervals over "
        "prompts, pooled over seeds. Judge: keyword. "
        f"{KeywordJudge.caveat}",
        "- Against its controls: points of refusal on the same harmful prompts of all sets, in brackets the prompts "
        "on which only the method, only the control "
        "refuses, and McNemar's exact p (prompts repeat over seeds, so it is somewhat too small).",
        f"- {len(planned) - gone} of the {len(planned)} cells of the full plan; everything else, and what is missing, "
        "in `benchmarks/results/frontier.html`.",
        f"- Environment: {facts}.",
        "- Written by `python -m benchmarks.frontier --report` (`benchmarks/results/frontier.jsonl`).",
    ]
    if split != "test":
        lines.insert(2, "**Validation prompts only: nothing here is a result.**\n")
    return f"{MARKERS[0]}\n" + "\n".join(lines) + f"\n{MARKERS[1]}"


def _headline(found: pictures.Points) -> float:
    there = shares(found)
    if not there or not any(point.rows for point in found.values()):
        raise DataError("no finite cell to report on. Run python -m benchmarks.frontier first.")
    return FIRST_POISON if FIRST_POISON in there else there[0]


def report(out: Path = RESULTS, page_path: Path | None = PAGE) -> None:
    """Write the pictures and the page beside the results, and the section of docs/results.md.

    Raises:
        DataError: no results, or a page without markers; nothing is written then.
    """
    environment, rows = read(out / NAME)
    found = points(rows)
    poison, planned = _headline(found), plan(list(METHODS.values()))
    text = None if page_path is None else with_section(page_path, MARKERS, section(out / NAME))
    paths = [draw(found, out / name) for name, draw in PICTURES.items()]
    publish(
        out / "frontier.html", page(found, environment, paths, split_of(rows), poison, missing(rows, planned), planned)
    )
    if page_path is not None and text is not None:
        publish(page_path, text)
    print(
        f"wrote {out / 'frontier.html'}, {', '.join(path.name for path in paths)}"
        + (f" and the section of {page_path}" if page_path else "")
    )
