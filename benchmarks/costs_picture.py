"""What a training step takes beside plain LoRA's, as PNG: processor time and peak memory of each method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, recorded
from peft_safety.reporting import style

NAMES = {
    "lora": "plain LoRA",
    "lora-fa": "LoRA-FA",
    "frozen": "GuardSpace, frozen A",
    "salora": "SaLoRA (projects in each step)",
    "dense C": "SaLoRA, dense form",
}
Drawn = tuple[float, style.Interval]


def step_times(rows: Sequence[dict[str, Any]], base: str) -> dict[str, Drawn]:
    """By arm: processor time of a step at the most tokens, as a multiple of plain LoRA's, with quartiles."""
    timed = [row for row in rows if "ratio" in row and row["base"] == base and row["ratio"].endswith("/lora")]
    most = max((row["tokens"] for row in timed), default=0)
    found: dict[str, Drawn] = {"lora": (1.0, (1.0, 1.0))}
    for row in timed:
        if row["tokens"] == most:
            low, _, high = row["cpu quartiles"].partition("-")
            found[row["ratio"].partition("/")[0]] = row["cpu"], (float(low), float(high))
    return found


def memory(rows: Sequence[dict[str, Any]], base: str) -> dict[str, Drawn]:
    """By arm: peak memory of a process, as a multiple of plain LoRA's."""
    (row,) = (row for row in rows if row["base"] == base and "lora MiB" in row)
    found = {arm: row[f"{arm} MiB"] / row["lora MiB"] for arm in NAMES if f"{arm} MiB" in row}
    return {arm: (value, (value, value)) for arm, value in found.items()}


def draw(rows: Sequence[dict[str, Any]], path: Path, base: str = "fp32") -> Path:
    """One bar a method in each of two panels; whiskers are quartiles."""
    panels = {"processor time of a step": step_times(rows, base), "peak memory": memory(rows, base)}
    shown = [arm for arm in NAMES if all(arm in values for values in panels.values())]
    title = "What protection costs in training; plain LoRA = 1"
    note = "SmolLM2-135M on a CPU, rank 16 on all layers; arms take turns. Lines: quartiles."
    with style.picture(path, 0.7 + 0.3 * len(shown), 2, title=title, note=note, sharey=True) as (_, axes):
        for panel, (what, values) in zip(axes, panels.items(), strict=True):
            for y, arm in enumerate(shown):
                value, ends = values[arm]
                style.bar(panel, y, value, style.color_of(NAMES[arm]), ends, f"{value:.2f}", beside=1.0)
            panel.axvline(1, color=style.INK, lw=0.8, ls=":")
            panel.set_title(what)
            panel.margins(x=0.25, y=0.02)
            panel.tick_params(axis="y", length=0)
        axes[0].set_yticks(range(len(shown)), [NAMES[arm] for arm in shown])
        axes[0].invert_yaxis()
    return path


def report(out: Path = RESULTS, _: Path | None = None) -> None:
    """Draw the picture next to the results."""
    draw(recorded("train_step", out)[1], out / "costs.png")
