"""The tables of the report: text, rendered as markdown and as HTML."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.frontier.aggregate import RATES, Points, cost, label, names, pairs, points, pooled, shares
from benchmarks.frontier.cells import cell_of
from benchmarks.frontier.plan import FIRST_POISON, METHODS, name_of
from benchmarks.frontier.results import Row
from peft_safety.evaluation import Rate
from peft_safety.evaluation.metrics import Paired

NOTHING = "-"


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


def _bare(rate: Rate | None) -> str:
    return NOTHING if rate is None else f"{100 * rate.value:.0f}"


def number(value: float | None, digits: int = 2) -> str:
    """A number, or a dash."""
    return NOTHING if value is None else f"{value:.{digits}f}"


def difference(pair: Paired | None) -> str:
    """Two arms on the same prompts: difference in points, prompts on which only one succeeds, and the p value."""
    if pair is None:
        return NOTHING
    p = "p < 0.001" if pair.p_value < 0.001 else f"p = {pair.p_value:.3f}"
    return f"{100 * pair.difference:+.0f} ({pair.only_first} : {pair.only_second}, {p})"


def headline(points: Points, poison: float) -> Table:
    """The table of the page, one line for each method: refusal at every share of poison, the other figures at one
    share, and refusal against both controls.
    """
    columns = shares(points)
    headings = ("", *(f"refusal, {share(p)}" for p in columns))
    headings += tuple(f"{heading}, {share(poison)}" for heading in ("accuracy", "over-refusal", "general NLL"))
    headings += tuple(f"refusal against {kind}, {share(poison)}" for kind in ("random", "equal norm"))
    headings += (f"seeds, {share(poison)}",)
    rows = []
    for name in names(points, controls=False):
        point = points.get((name, poison))
        seeds = NOTHING if point is None or name.startswith("aligned") else str(len(point.rows) + point.diverged)
        rates = [percent(points[name, p].rate("refusal")) if (name, p) in points else NOTHING for p in columns]
        if name.startswith("aligned"):  # it does not depend on the share of poison
            rates = [rates[0], *[""] * (len(columns) - 1)]
        rest = (
            [NOTHING] * 3
            if point is None
            else [
                _bare(point.rate("task_accuracy")),
                _bare(point.rate("over_refusal")),
                number(point.mean("general_nll")),
            ]
        )
        against = [difference(_against(points, name, kind, poison)) for kind in ("random", "scaled")]
        rows.append((label(name), *rates, *rest, *against, seeds))
    return Table(headings, rows)


def settings(rows: Sequence[Row]) -> Table | None:
    """Settings that were tried on validation prompts: the size of the null space, the length of the fine-tune."""
    lines = []
    for row in rows:
        cell = cell_of(row)
        if cell.split != "validation" or "diverged" in row:
            continue
        untrained = cell.arm == "aligned"
        size = f"n/{1 / cell.fraction:g}" if cell.fraction else NOTHING
        usual: dict[str, Any] = {"epochs": METHODS["lora"].epochs}
        usual |= {"fraction": METHODS["frozen"].fraction} if cell.fraction else {}
        steps = NOTHING if untrained else str(row["steps"])
        figures = [percent(pooled([row], rate)) for rate in ("refusal", "over_refusal", "task_accuracy")]
        name = label("aligned" if untrained else name_of(replace(cell, **usual)))
        key = (not untrained, cell.epochs, cell.control, cell.arm != "lora", name, -cell.fraction)
        lines.append((key, (name, size, share(cell.poison) if not untrained else NOTHING, steps, *figures)))
    headings = ("on validation prompts", "null space", "poison", "steps", "refusal", "over-refusal", "accuracy")
    return Table(headings, [line for _, line in sorted(lines)]) if lines else None


def other_tasks(tasks: Mapping[str, Sequence[Row]]) -> Table | None:
    """Test cells of other tasks by the task's name; None without any. What was learned is the accuracy, or for a task
    of free answers the NLL of those held out.
    """
    lines = []
    for task, rows in tasks.items():
        shown = points([row for row in rows if row["cell"]["split"] == "test"])
        for (name, poison), point in sorted(shown.items(), key=lambda item: item[0][1] != FIRST_POISON):
            if name == "aligned" and poison != FIRST_POISON:
                continue
            accuracy, loss = point.rate("task_accuracy"), point.mean("task_nll")
            learned = percent(accuracy) if loss is None else f"NLL {number(loss)}"
            rates = (percent(point.rate("refusal")), percent(point.rate("over_refusal")))
            place = NOTHING if name == "aligned" else share(poison)
            lines.append((task, label(name), place, *rates, learned, number(point.mean("general_nll"))))
    headings = ("other tasks", "", "poison", "refusal", "over-refusal", "learned", "general NLL")
    return Table(headings, lines, labels=2) if lines else None


def _against(points: Points, name: str, kind: str, poison: float, what: str = "refusal") -> Paired | None:
    point, control = points.get((name, poison)), points.get((f"{kind}:{name}", poison))
    return pairs(point, control, what) if point is not None and control is not None else None


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
        (label(name), *(percent(points[name, poison].transfer(key)) for key in sets))
        for name in names(points)
        if (name, poison) in points
    ]
    return Table(
        ("", *(f"refusal, {name.replace('_', ' ')}" for name in sets)),
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
        texts = (
            {
                judge: "".join(row["verdicts"].get(judge, {}).get("harmful", "") for row in points[name, poison].rows)
                for judge in judges
            }
            if (name, poison) in points
            else {}
        )
        if any(texts.values()):
            rows.append(
                (
                    label(name),
                    *(
                        percent(Rate(text.count(letter), len(text))) if text else NOTHING
                        for text in texts.values()
                        for letter in "RC"
                    ),
                )
            )
    return Table(("", *(f"{what}, {judge}" for judge in judges for what in ("refusal", "compliance"))), rows)


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


def costs(points: Points) -> Table:
    """Time and memory as multiples of plain LoRA's."""
    rows = []
    for name in names(points, controls=False):
        train, setup, memory = cost(points, name)
        if train is not None:
            rows.append((label(name), number(train), number(setup), number(memory)))
    note = (
        "Medians over the cells of a method, for calibration or repair the most (one calibration serves all cells of "
        "a process); training includes the injection of the adapter, and with a frozen A one pass over 32 rows; "
        "processor time on the CPU, wall clock on a GPU."
    )
    return Table(("", "training time", "calibration or repair", "memory added while training"), rows, note)


def absent(missing: dict[str, int], planned: Sequence[object]) -> Table:
    """The cells of the full plan that are missing from the results."""
    rows = [(label(name), str(count)) for name, count in missing.items()]
    return Table(("", f"cells missing of the full plan of {len(planned)}"), rows)
