"""The demo's picture: how many harmful requests each model refuses, and how well it does the task."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft_safety.evaluation import Evaluation
    from peft_safety.evaluation.metrics import Rate

COLORS = {
    "aligned": "#777777",
    "plain LoRA": "#D55E00",
    "GuardSpace": "#0072B2",
    "SaLoRA": "#CC79A7",
    "random basis": "#E69F00",
}
"""Okabe and Ito's palette, safe for color-blind readers."""


def draw(evaluations: Mapping[str, Evaluation], poison: float, path: Path) -> Path:
    """Two panels of bars with their values and 95 % intervals, under a title that says what they show."""
    from matplotlib.figure import Figure as Canvas

    names = list(evaluations)
    canvas = Canvas(figsize=(8.4, 1.5 + 0.62 * len(names)), layout="constrained")
    panels = canvas.subplots(1, 2, sharey=True)
    _bars(panels[0], {name: found.refusal for name, found in evaluations.items()}, "refuses harmful requests")
    _bars(
        panels[1],
        {name: found.task_accuracy for name, found in evaluations.items() if found.task_accuracy},
        "sorts help-desk messages correctly",
    )
    panels[0].set_yticks(range(len(names)), [name if name == "aligned" else f"fine-tuned: {name}" for name in names])
    panels[0].set_ylim(len(names) - 0.4, -0.6)
    canvas.suptitle(title(evaluations, poison), fontsize=12, fontweight="bold", x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path, dpi=150, format="png", bbox_inches="tight", pad_inches=0.15)
    return path


def title(evaluations: Mapping[str, Evaluation], poison: float) -> str:
    """The message, from the figures themselves."""
    rows = f"One row in {1 / poison:.0f} poisoned" if poison else "Clean rows"
    lora, guard = (evaluations[name].refusal.value for name in ("plain LoRA", "GuardSpace"))
    return f"{rows}: then plain LoRA refuses {lora:.0%} of harmful requests, GuardSpace {guard:.0%}"


def _bars(panel: Any, rates: Mapping[str, Rate], heading: str) -> None:
    for row, (name, rate) in enumerate(rates.items()):
        value, (low, high) = 100 * rate.value, (100 * bound for bound in rate.interval)
        panel.barh(row, value, color=COLORS.get(name, "#56B4E9"), height=0.62)
        panel.plot([low, high], [row, row], color="black", linewidth=1.2, alpha=0.6)
        panel.annotate(
            f"{value:.0f} %", (max(value, high), row), (6, 0), textcoords="offset points", va="center", fontsize=11
        )
    panel.set_xlim(0, 118)
    panel.set_xticks([0, 50, 100], ["0", "50", "100 %"])
    panel.set_title(heading, fontsize=11, loc="left")
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelsize=10)
