"""The tables of the report: text, rendered as markdown and as HTML."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.frontier.aggregate import RATES, Point, Points, averaged, label, names, pairs
from benchmarks.frontier.results import Row
from peft_safety.evaluation import Rate
from peft_safety.evaluation.metrics import Paired

NOTHING = "-"
BRACKETS = "Brackets: 95 % intervals over prompts; seeds are averaged."


@dataclass(frozen=True)
class Table:
    """Headings, rows of text, and a note for the reader. The first `labels` columns are aligned to the left."""

    headings: tuple[str, ...]
    rows: list[tuple[str, ...]]
    note: str = ""
    labels: int = 1

    def markdown(self) -> list[str]:
        """Lines of a markdown table."""
        lines = [
            "| " + " | ".join(self.headings) + " |",
            "| " + " | ".join(["---"] * self.labels + ["---:"] * (len(self.headings) - self.labels)) + " |",
        ]
        return lines + ["| " + " | ".join(row) + " |" for row in self.rows]

    def html(self) -> str:
        """A table element."""
        head = "".join(f"<th>{html.escape(heading)}</th>" for heading in self.headings)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(value)}</td>" for value in row) + "</tr>" for row in self.rows
        )
        note = f"<p class=note>{html.escape(self.note)}</p>" if self.note else ""
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{note}"


def share(poison: float) -> str:
    """A share of poison in a heading."""
    return f"p = {poison:g}"


def percent(rate: Rate | None, missing: str = NOTHING) -> str:
    """A rate with its interval, or `missing`."""
    return missing if rate is None else str(rate)


def told(point: Point | None, metric: str, usual: int = 0) -> str:
    """A rate of a point, and of how many seeds it is where that is not the `usual` number."""
    if point is None or not point.rows:
        return NOTHING
    count, free = len(point.rows), point.name.startswith("aligned")
    return percent(point.rate(metric)) + ("" if free or count == usual else seeds(count))


def seeds(count: int) -> str:
    """The number of seeds of a figure, behind it."""
    return f" ({count} seed{'s' if count != 1 else ''})"


def number(value: float | None, digits: int = 2) -> str:
    """A number, or a dash."""
    return NOTHING if value is None else f"{value:.{digits}f}"


def difference(pair: Paired | None) -> str:
    """Two arms on the same prompts: difference in points, prompts on which only one succeeds, and the p value."""
    if pair is None:
        return NOTHING
    p = "p < 0.001" if pair.p_value < 0.001 else f"p = {pair.p_value:.3f}"
    return f"{100 * pair.difference:+.0f} ({pair.only_first} : {pair.only_second}, {p})"


def everything(points: Points, poison: float) -> Table:
    """Every figure of every arm at one share of poison."""
    headings = ("", *RATES.values(), "general NLL", "norm of dW", "seeds", "diverged")
    rows = []
    for name in names(points):
        point = points.get((name, poison))
        if point is not None:
            rates = [percent(point.rate(metric)) for metric in RATES]
            rows.append(
                (
                    label(name),
                    *rates,
                    number(point.mean("general_nll")),
                    number(point.mean("norm")),
                    str(len(point.rows)),
                    str(point.diverged or ""),
                )
            )
    return Table(headings, rows)


def transfer(points: Points, poison: float) -> Table | None:
    """Refusal on the public sets; None without any."""
    sets = list(
        dict.fromkeys(name for point in points.values() for row in point.rows for name in row.get("transfer", {}))
    )
    if not sets:
        return None
    rows = [
        (
            label(name),
            *(percent(points[name, poison].transfer(key)) for key in sets),
            str(len(points[name, poison].rows)),
        )
        for name in names(points)
        if (name, poison) in points
    ]
    return Table(
        ("", *(f"refusal, {name.replace('_', ' ')}" for name in sets), "seeds"),
        rows,
        "XSTest safe: refusals there are over-refusals.",
    )


def verdicts_of_judges(points: Points, poison: float) -> Table | None:
    """Refusal and compliance by every judge; None where the keyword matcher is alone."""
    judges = list(dict.fromkeys(judge for point in points.values() for row in point.rows for judge in row["verdicts"]))
    if len(judges) < 2:
        return None
    rows = []
    for name in names(points):
        found = points[name, poison].rows if (name, poison) in points else []
        rates = [_judged(found, judge, letter) for judge in judges for letter in "RC"]
        if any(rates):
            rows.append((label(name), *map(percent, rates)))
    return Table(("", *(f"{what}, {judge}" for judge in judges for what in ("refusal", "compliance"))), rows)


def _judged(rows: Sequence[Row], judge: str, letter: str) -> Rate | None:
    """How often a judge gave a verdict on the harmful prompts."""
    texts = [text for row in rows if (text := row["verdicts"].get(judge, {}).get("harmful"))]
    return averaged([{"k": text.count(letter), "n": len(text)} for text in texts])


def paired(points: Points, poison: float) -> Table:
    """Every method against plain LoRA and its controls, prompt by prompt."""
    others: list[tuple[str, Callable[[str], str]]] = [
        ("plain LoRA", lambda _: "lora"),
        ("random basis", "random:{}".format),
        ("equal norm", "scaled:{}".format),
    ]
    rows = []
    for name in names(points, controls=False):
        cells = []
        for _, other in others:
            first, second = points.get((name, poison)), points.get((other(name), poison))
            for what in ("refusal", "task"):
                usable = first is not None and second is not None and other(name) != name
                cells.append(difference(pairs(first, second, what)) if usable and first and second else NOTHING)
        rows.append((label(name), *cells))
    headings = ("", *(f"{what} against {title}" for title, _ in others for what in ("refusal", "accuracy")))
    note = (
        "Points of percent on the same prompts and seeds, in brackets the prompts on which only the one, only the "
        "other succeeds, and McNemar's exact p. "
        "All sets of harmful prompts together; prompts repeat over seeds, so p is somewhat too small. Not corrected "
        "for many comparisons."
    )
    return Table(headings, rows, note)


def absent(missing: dict[str, int], planned: Sequence[object]) -> Table:
    """The cells of the full plan that are missing from the results."""
    rows = [(label(name), str(count)) for name, count in missing.items()]
    return Table(("", f"cells missing of the full plan of {len(planned)}"), rows)
