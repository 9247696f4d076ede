"""Cells with equal settings become one point of the frontier; points are compared in pairs; costs."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.frontier.cells import cell_of
from benchmarks.frontier.measure import CONTRAST, HARMFUL
from benchmarks.frontier.plan import METHODS, name_of
from benchmarks.frontier.results import Row
from peft_safety.evaluation import Rate
from peft_safety.evaluation.metrics import Paired

RATES = {
    "refusal": "refusal, harmful",
    "compliance": "compliance, harmful",
    "over_refusal": "over-refusal, safe",
    "task_accuracy": "accuracy, trained task",
    "second_accuracy": "accuracy, untrained task",
}
"""Field of a cell -> its heading."""
LABELS = {
    "aligned": "aligned, no fine-tune",
    "lora": "plain LoRA",
    "guardspace": "GuardSpace",
    "frozen": "GuardSpace, frozen A",
    "frozen-random": "GuardSpace, frozen random A",
    "frozen-own": "GuardSpace, frozen A, in the data's contexts",
    "frozen-system": "GuardSpace, frozen A, under the data's system prompts",
    "chain-system": "screen (all flagged) + frozen A, under the data's system prompts",
    "chain-own": "screen (all flagged) + frozen A, in the data's contexts",
    "chain-clean": "screen (all flagged) + frozen A, contexts, clean",
    "frozen-clean": "GuardSpace, frozen A, contexts, clean",
    "frozen-context": "GuardSpace, frozen A, in context",
    "frozen-screened": "screen + frozen A",
    "frozen-flagged": "screen (all flagged) + frozen A",
    "chain": "screen + frozen A, in context",
    "chain-flagged": "screen (all flagged) + frozen A, in context",
    "chain-anchor": "screen + frozen A, in context, with an anchor",
    "frozen-anchor": "GuardSpace, frozen A, with an anchor",
    "lora-anchor": "anchor + plain LoRA",
    "lora-anchor-everyday": "anchor of everyday answers + plain LoRA",
    "lora-screened": "screen + plain LoRA",
    "lora-flagged": "screen (all flagged) + plain LoRA",
    "frozen-r16": "GuardSpace, frozen A, r = 16",
    "window-64": "GuardSpace, window 64",
    "window-256": "GuardSpace, window 256",
    "task-frozen": "task's A, frozen, not blind",
    "task-trained": "task's A, trained, not blind",
    "blind": "plain LoRA, made blind",
    "guardspace-general": "GuardSpace, general basis",
    "safe-lora": "Safe LoRA, threshold",
    "safe-lora-number": "Safe LoRA, number",
    "safe-lora-topk": "Safe LoRA, top-k",
    "safe-lora-soft": "Safe LoRA, soft",
    "salora-32": "SaLoRA, 32",
    "salora-0.9": "SaLoRA, 0.9 of d",
    "both-sides": "GuardSpace + SaLoRA",
    "lora-mixed": "plain LoRA + 10 % safety data",
    "patch-reattached": "patch re-attached",
    "patch-stacked": "patch stacked",
    "somf": "SOMF",
    "patch-stacked-seen": "patch stacked, on the poison's requests",
    "somf-seen": "SOMF, on the poison's requests",
}
KINDS = {"random": "random basis for {}", "scaled": "plain LoRA at the norm of {}"}


def label(name: str) -> str:
    """A method's name for people."""
    kind, colon, method = name.partition(":")
    if colon:
        return KINDS[kind].format(label(method))
    setting = ""
    if " with " in name:
        name, _, setting = name.partition(" with ")
    if name.endswith("-nf4"):
        return f"{label(name[:-4])}, 4-bit{' (' + setting + ')' if setting else ''}"
    return LABELS.get(name, name) + (f" ({setting})" if setting else "")


@dataclass
class Point:
    """A method at one share of poison, all seeds together.

    Attributes:
        rows: cells with finite figures. diverged: number of the other cells.
    """

    name: str
    poison: float
    rows: list[Row] = field(default_factory=list)
    diverged: int = 0

    def add(self, row: Row) -> None:
        """Count one cell."""
        if "diverged" in row:
            self.diverged += 1
        else:
            self.rows.append(row)

    def rate(self, metric: str) -> Rate | None:
        """See `pooled`."""
        return pooled(self.rows, metric)

    def transfer(self, name: str) -> Rate | None:
        """Refusal on another prompt set."""
        return pooled([row["transfer"] for row in self.rows if "transfer" in row], name)

    def mean(self, key: str) -> float | None:
        """Mean over seeds of a plain number, or of a figure's value."""
        values = [
            row[key]["value"] if isinstance(row[key], dict) else row[key]
            for row in self.rows
            if row.get(key) is not None
        ]
        return statistics.mean(values) if values else None

    def at(self, seed: int) -> Point:
        """One of its seeds alone."""
        return Point(self.name, self.poison, [row for row in self.rows if row["cell"]["seed"] == seed])

    @property
    def control(self) -> str:
        """ "random", "scaled", or empty for a method."""
        return self.name.partition(":")[0] if ":" in self.name else ""


Points = dict[tuple[str, float], Point]
"""By method and share of poison."""


def pooled(rows: Sequence[Row], metric: str) -> Rate | None:
    """A rate, see `averaged`."""
    return averaged([row[metric] for row in rows if row.get(metric)])


def averaged(rates: Sequence[Mapping[str, Any]]) -> Rate | None:
    """The mean over seeds of the counts {k, n}. All seeds ask the same prompts, so that the interval is that of their
    number: more seeds do not make it narrower. `k` may be a fraction.
    """
    if not rates:
        return None
    k, n, prompts = (
        sum(rate["k"] for rate in rates),
        sum(rate["n"] for rate in rates),
        min(rate["n"] for rate in rates),
    )
    return Rate(prompts * k / n, prompts)


def split_of(rows: Sequence[Row]) -> str:
    """The split of a report: test if there are test cells, else validation."""
    return "test" if any(row["cell"]["split"] == "test" for row in rows) else "validation"


def points(rows: Sequence[Row]) -> Points:
    """All points of `split_of(rows)`, methods in the order of the plan. "aligned" does not depend on the share of
    poison and is repeated at every share.
    """
    split, grouped = split_of(rows), {}
    kept = [(cell_of(row), row) for row in rows if row["cell"]["split"] == split]
    shares = sorted({cell.poison for cell, _ in kept if cell.arm != "aligned"}) or [0.0]
    for cell, row in kept:
        for share in shares if cell.arm == "aligned" else [cell.poison]:
            grouped.setdefault((name_of(cell), share), Point(name_of(cell), share)).add(row)
    order = list(METHODS)
    known = {name: index for index, name in enumerate(order)}
    return dict(sorted(grouped.items(), key=lambda item: (known.get(item[0][0], len(order)), item[0][0], item[0][1])))


def names(points: Points, controls: bool | None = None) -> list[str]:
    """The names of the points, each once: all, only controls, or no controls."""
    listed = dict.fromkeys(name for name, _ in points)
    return [name for name in listed if controls is None or controls == (":" in name)]


def shares(points: Points) -> list[float]:
    """The shares of poison among points."""
    return sorted({poison for _, poison in points})


def harmful_sets(row: Row) -> list[str]:
    """Names of a cell's sets of harmful prompts."""
    return [
        name
        for name in row["verdicts"][row["judge"]]
        if name == HARMFUL or (name != CONTRAST and not name.endswith("_safe"))
    ]


def pairs(first: Point, second: Point, what: str = "refusal") -> Paired | None:
    """Two points on the same prompts (or task rows, `what` = "task") and seeds; None where they share none.

    Refusals are compared on all sets of harmful prompts together.
    """
    a, b = [], []
    for one, other in _matched(first, second):
        if what == "task":
            left, right = ([mark == "1" for mark in row["correct"]["task"]] for row in (one, other))
        else:
            left, right = (
                [mark == "R" for name in harmful_sets(one) for mark in row["verdicts"][row["judge"]][name]]
                for row in (one, other)
            )
        a += left
        b += right
    return Paired.of(a, b) if a else None


def _matched(first: Point, second: Point) -> Iterator[tuple[Row, Row]]:
    """Pairs of cells with equal seed and equal prompt sets. "aligned" has no seed and goes with every one."""
    free = "aligned" in (first.name, second.name)
    for one in first.rows:
        for other in second.rows:
            if (free or one["cell"]["seed"] == other["cell"]["seed"]) and harmful_sets(one) == harmful_sets(other):
                yield one, other


def missing(rows: Sequence[Row], planned: Sequence[Any]) -> dict[str, int]:
    """Number of missing cells of each method."""
    done = {cell_of(row) for row in rows}
    count: dict[str, int] = {}
    for cell in planned:
        if cell not in done:
            count[name_of(cell)] = count.get(name_of(cell), 0) + 1
    return count
