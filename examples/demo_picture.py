"""The demo's picture: how many harmful requests each model refuses, and how well it does the task."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_safety.reporting import style

if TYPE_CHECKING:
    from peft_safety.evaluation import Evaluation
    from peft_safety.evaluation.metrics import Rate

NOTE = "Dark lines: 95 % intervals."


def draw(evaluations: Mapping[str, Evaluation], poison: float, path: Path) -> Path:
    """Two panels of bars with their values and 95 % intervals, under a title that says what they show."""
    names, heading = list(evaluations), title(evaluations, poison)
    with style.picture(path, 0.7 + 0.4 * len(names), 2, title=heading, note=NOTE, sharey=True) as (_, panels):
        _bars(panels[0], {name: found.refusal for name, found in evaluations.items()}, "refuses harmful requests")
        _bars(
            panels[1],
            {name: found.task_accuracy for name, found in evaluations.items() if found.task_accuracy},
            "sorts help-desk messages",
        )
        said = [name if name == "aligned" else f"fine-tuned: {name}" for name in names]
        panels[0].set_yticks(range(len(names)), said)
        panels[0].set_ylim(len(names) - 0.4, -0.6)
    return path


def title(evaluations: Mapping[str, Evaluation], poison: float) -> str:
    """The message, from the figures themselves."""
    rows = f"One row in {1 / poison:.0f} poisoned" if poison else "Clean rows"
    lora, guard = (evaluations[name].refusal.value for name in ("plain LoRA", "GuardSpace"))
    return f"{rows}: then plain LoRA refuses {lora:.0%} of harmful requests, GuardSpace {guard:.0%}"


def _bars(panel: Any, rates: Mapping[str, Rate], heading: str) -> None:
    for row, (name, rate) in enumerate(rates.items()):
        value, (low, high) = 100 * rate.value, (100 * bound for bound in rate.interval)
        style.bar(panel, row, value, style.color_of(name), (low, high), f"{value:.0f} %", height=0.62)
    panel.set_xlim(0, 122)
    panel.set_xticks([0, 50, 100], ["0", "50", "100 %"])
    panel.set_title(heading)
    panel.tick_params(axis="y", length=0)
