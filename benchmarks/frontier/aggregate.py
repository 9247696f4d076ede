"""Cells with equal settings become one point of the frontier; points are compared in pairs; costs."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.frontier.cells import cell_of
from benchmarks.frontier.measure import CONTRAST, HARMFUL
from benchmarks.frontier.plan import METHODS, name_of
from benchmarks.frontier.results import Row
from peft_safety.evaluation import Paired, Rate

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
        rows: finite cells. diverged: how many were not.
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
        found = [
            row[key]["value"] if isinstance(row[key], dict) else row[key]
            for row in self.rows
            if row.get(key) is not None
        ]
        return statistics.mean(found) if found else None

    @property
    def control(self) -> str:
        """ "random", "scaled", or empty for a method."""
        return self.name.partition(":")[0] if ":" in self.name else ""


Points = dict[tuple[str, float], Point]
"""By method and share of poison."""


def pooled(rows: Sequence[Row], metric: str) -> Rate | None:
    """A rate over all prompts of all seeds; the interval takes prompts repeated over seeds as independent, which they
    are not quite.
    """
    found = [row[metric] for row in rows if row.get(metric)]
    return Rate(sum(rate["k"] for rate in found), sum(rate["n"] for rate in found)) if found else None


def split_of(rows: Sequence[Row]) -> str:
    """What a report is about: test prompts if there are any, else validation prompts."""
    return "test" if any(row["cell"]["split"] == "test" for row in rows) else "validation"


def points(rows: Sequence[Row]) -> Points:
    """All points of `split_of(rows)`, methods in the plan's order. "aligned" stands at every share of poison, which it
    does not depend on.
    """
    split, found = split_of(rows), {}
    kept = [(cell_of(row), row) for row in rows if row["cell"]["split"] == split]
    shares = sorted({cell.poison for cell, _ in kept if cell.arm != "aligned"}) or [0.0]
    for cell, row in kept:
        for share in shares if cell.arm == "aligned" else [cell.poison]:
            found.setdefault((name_of(cell), share), Point(name_of(cell), share)).add(row)
    order = list(METHODS)
    known = {name: index for index, name in enumerate(order)}
    return dict(sorted(found.items(), key=lambda item: (known.get(item[0][0], len(order)), item[0][0], item[0][1])))


def names(found: Points, controls: bool | None = None) -> list[str]:
    """The methods among points, each once; only controls, or none of them."""
    listed = dict.fromkeys(name for name, _ in found)
    return [name for name in listed if controls is None or controls == (":" in name)]


def shares(found: Points) -> list[float]:
    """The shares of poison among points."""
    return sorted({poison for _, poison in found})


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
    """Cells of equal seed and equal prompt sets; one without a seed of its own (no fine-tune) goes with every seed."""
    free = "aligned" in (first.name, second.name)
    for one in first.rows:
        for other in second.rows:
            if (free or one["cell"]["seed"] == other["cell"]["seed"]) and harmful_sets(one) == harmful_sets(other):
                yield one, other


def missing(rows: Sequence[Row], planned: Sequence[Any]) -> dict[str, int]:
    """How many planned cells of each method are not there."""
    done = {cell_of(row) for row in rows}
    count: dict[str, int] = {}
    for cell in planned:
        if cell not in done:
            count[name_of(cell)] = count.get(name_of(cell), 0) + 1
    return count


def cost(found: Points, name: str) -> tuple[float | None, float, float | None]:
    """Seconds of training and besides it, and memory, as multiples of plain LoRA's; None where there are none.

    Training and memory: the median over cells of the ratio to plain LoRA at the same place (share of poison and seed).
    Besides it: the most that any cell took, since only the first one of a process calibrates. Seconds of processor
    time where they were taken: other jobs on the machine disturb them less.
    """
    unit = "cpu_seconds" if _values(found, "lora", "train_cpu_seconds") else "seconds"
    train, memory = (_ratio(found, name, key) for key in (f"train_{unit}", "added_mib"))
    if train is None:
        return None, 0.0, None
    setup = max(_values(found, name, f"setup_{unit}").values(), default=0.0)
    return train, setup / statistics.median(_values(found, "lora", f"train_{unit}").values()), memory


def _values(found: Points, name: str, key: str) -> dict[tuple[float, int], float]:
    """By share of poison and seed."""
    return {
        (share, row["cell"]["seed"]): row[key]
        for (other, share), point in found.items()
        if other == name
        for row in point.rows
        if row.get(key)
    }


def _ratio(found: Points, name: str, key: str) -> float | None:
    base, own = _values(found, "lora", key), _values(found, name, key)
    ratios = [value / base[place] for place, value in own.items() if place in base]
    return statistics.median(ratios) if ratios else None
