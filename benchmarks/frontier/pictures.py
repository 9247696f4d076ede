"""The frontier, and refusal and accuracy by share of poison, as PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.frontier.aggregate import Point, Points, label, shares
from benchmarks.frontier.plan import FIRST_POISON
from peft_safety.evaluation import Rate
from peft_safety.reporting import style

MARKERS = {"": "o", "random": "s", "scaled": "^"}
TOO_CAREFUL = 0.25
"""Over-refusal above this is written in the label: such a method may refuse everything that looks dangerous."""
AXES = {"task_accuracy": "accuracy on the trained task, %", "refusal": "refusal of harmful prompts, %"}
NOTES = {
    "*": "★ aligned model",
    "o": "● method",
    "D": "◆ method on a 4-bit base",
    "s": "□ control: random basis of equal size",
    "^": "△ control: plain LoRA at the same norm",
}
NAMED = ("aligned", "lora", "guardspace", "frozen", "blind", "safe-lora", "safe-lora-soft")
"""Arms with a name in the picture of the frontier: those that the first page and the README speak of."""
OTHERS = "#B4B4AD"
"""Color of all others there."""
ROLES = ("aligned", "lora", "frozen", "random:frozen")
"""Reference, baseline, method and its control."""


def marker(name: str) -> str:
    """A star is the aligned model, a diamond a 4-bit base."""
    return "*" if name == "aligned" else "D" if name.endswith("-nf4") else MARKERS[name.rpartition(":")[0]]


def percent(rate: Rate) -> tuple[float, style.Interval]:
    low, high = rate.interval
    return 100 * rate.value, (100 * low, 100 * high)


def frontier(points: Points, path: Path) -> Path:
    """Refusal over accuracy with 95 % intervals, at the share of poison where methods differ most. Controls are
    hollow. Few points have a name and a color, so that it is legible on the first page, where it is small.
    """
    measured = shares(points)
    poison = FIRST_POISON if FIRST_POISON in measured or not measured else measured[0]
    title = f"Refusal and accuracy, {100 * poison:g} % of the rows poisoned"
    shown = {marker(name) for name, share in points if share == poison}
    note = ", ".join(text for form, text in NOTES.items() if form in shown)
    note = f"{note}. Gray: others. Up and right is better; lines are 95 % intervals."
    with style.picture(path, 2.7, title=title, note=note, width=style.NARROW) as (_, (panel,)):
        labeled = []
        for named, name in sorted((_named(name), name) for name, share in points if share == poison):  # gray below
            point = points[name, poison]
            x, y, hollow = point.rate("task_accuracy"), point.rate("refusal"), bool(point.control)
            if x is None or y is None:
                continue
            (at_x, across), (at_y, up) = percent(x), percent(y)
            tint = style.color_of(name) if named else OTHERS
            style.point(panel, at_x, at_y, tint, across, up, hollow, marker(name))
            if named and not hollow:
                labeled.append((at_x, at_y, label(name) + _price(point), tint))
        panel.set(xlim=(-4, None), ylim=(-4, 105), xlabel=AXES["task_accuracy"], ylabel=AXES["refusal"])
        panel.grid()
        style.label_points(panel, labeled)
    return path


def _named(name: str) -> bool:
    """Whether it is one of `NAMED`, or its control."""
    return name.rpartition(":")[2] in NAMED


def _price(point: Point) -> str:
    over = point.rate("over_refusal")
    careful = over is not None and over.value > TOO_CAREFUL
    return f"\nbut refuses {100 * over.value:.0f} % of safe ones" if over is not None and careful else ""


def poison(points: Points, path: Path) -> Path:
    """Refusal and accuracy of a method, its control and the baseline by share of poison, with 95 % intervals."""
    measured = shares(points)
    lines = [name for name in ROLES if any((name, share) in points for share in measured)]
    title, note = "Refusal and accuracy after fine-tuning, by the share of poison", "Lines: 95 % intervals."
    with style.picture(path, 4.6, 2, 2, title, note, sharex=True) as (_, axes):
        ends = {}
        for panel, metric in zip(axes, ("refusal", "task_accuracy"), strict=True):
            ends[panel] = [end for i, name in enumerate(lines) if (end := _line(panel, points, name, metric, i))]
            panel.set(ylim=(-4, 105), ylabel=AXES[metric])
            panel.set_xticks(range(len(measured)), [f"{100 * share:g} %" for share in measured])
            panel.grid(axis="y")
        axes[-1].set_xlabel("share of the training rows that is poisoned")
        for panel, labels in ends.items():
            style.label_points(panel, labels)
    return path


def _line(panel: Any, points: Points, name: str, metric: str, index: int) -> style.Label | None:
    """One line, shifted a little so that equal figures stay visible; returns the label of its end."""
    tint, hollow, placed = style.color_of(name), ":" in name, []
    for place, share in enumerate(shares(points)):
        rate = points[name, share].rate(metric) if (name, share) in points else None
        if rate is not None:
            value, up = percent(rate)
            placed.append((place + 0.05 * (index - 1.5), value))
            style.point(panel, *placed[-1], tint, up=up, hollow=hollow, marker=marker(name))
    if not placed:
        return None
    panel.plot(*zip(*placed, strict=True), color=tint, lw=1, ls=":" if hollow else "-", alpha=0.8, zorder=1)
    return *placed[-1], label(name), tint
