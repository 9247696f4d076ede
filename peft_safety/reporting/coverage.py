"""Coverage of input bases as a table, as JSON and as a picture."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from peft_safety.calibration.activations import kind_of
from peft_safety.calibration.coverage import TASK_ENERGY, ModuleCoverage
from peft_safety.errors import DataError
from peft_safety.reporting import render

GRID = 64
"""Points of a drawn curve."""
FLOOR = 1e-5
"""Lower end of the picture: smaller shares are rounding noise of the moments."""
COVERED_NOTE = "covered: share of the calibration inputs' energy inside the null space; the update does not see it."
TASK_NOTE = (
    "task: share of its inputs' energy that the update still sees, and the directions that hold "
    f"{TASK_ENERGY:.0%} of them, in all and outside."
)
Modules = Sequence[ModuleCoverage]
Figure = Callable[[ModuleCoverage], float | None]


def to_json(modules: Modules) -> list[dict[str, Any]]:
    """Plain values, one object a module."""
    result = []
    for row in modules:
        facts = {"name": row.name, "features": row.features, "k": row.k, "covered": row.covered}
        if row.task is not None:
            facts |= {"task_free": row.task.free, "task_rank": row.task.rank, "task_rank_free": row.task.rank_free}
        result.append(facts)
    return result


def show(modules: Modules) -> None:
    """Print medians by kind of module, with the smallest values."""
    task = _with_task(modules)
    headings = ["module", "inputs", "k", "covered", "(least)"]
    headings += ["task:\nseen", "(least)", "rank", "rank\noutside"] if task else []
    rows = []
    for kind, group in [*_kinds(modules).items(), ("all", modules)]:
        cells = [f"{kind} ({len(group)})", _span(group, lambda row: row.features), _span(group, lambda row: row.k)]
        cells += _median_and_least(group, lambda row: row.covered)
        if task:
            cells += _median_and_least(group, _of_task("free"))
            cells += [
                render.number(_median(group, figure), ".0f") for figure in (_of_task("rank"), _of_task("rank_free"))
            ]
        rows.append(cells)
    title = f"Null spaces of {len(modules)} modules, by kind (medians)"
    render.show(title, render.table(headings, rows), notes=[COVERED_NOTE, *([TASK_NOTE] if task else [])])


def save_png(modules: Modules, path: str | Path) -> Path:
    """Energy left outside against the size of the null space, and with task data the task's rank beside k, by kind of
    module.

    Raises:
        DataError: no module, or bases that do not say what they cover.
    """
    if not any(len(row.curve) for row in modules):
        raise DataError(
            "the subspace does not say what its input bases cover, so there is nothing to draw. Calibrate with "
            "method='guardspace'."
        )
    task = _with_task(modules)
    canvas, panels = render.figure(11.5 if task else 6.2, 4.2, 1 + task)
    _draw_energy(panels[0], modules)
    if task:
        _draw_ranks(panels[1], modules)
    return render.save_figure(canvas, path)


def _draw_energy(panel: Any, modules: Modules) -> None:
    """One line per kind: median energy outside the first k directions; a cross marks the task."""
    for index, (kind, rows) in enumerate(_kinds([row for row in modules if len(row.curve)]).items()):
        color = render.PALETTE[index % len(render.PALETTE)]
        sizes = [row.k / row.features for row in rows]
        shares = torch.linspace(min(1 / row.features for row in rows), max(sizes), GRID)
        outside = 1 - torch.stack([_covered_at(row, shares) for row in rows]).median(dim=0).values
        panel.plot((100 * shares).tolist(), outside.clamp(min=FLOOR).tolist(), color=color, label=kind, linewidth=1.6)
        free = _median(rows, _of_task("free"))
        if free is not None:
            panel.plot([100 * min(sizes)], [free], "x", color=color, markersize=7, markeredgewidth=2)
    panel.set_yscale("log")
    panel.set_ylim(bottom=FLOOR)
    panel.set_xlabel("k, % of the input dimensions", fontsize=9)
    panel.set_ylabel("share of energy outside", fontsize=9)
    crosses = "; crosses: the task" if _with_task(modules) else ""
    panel.set_title(f"What the update still sees (lines: calibration data{crosses})", fontsize=9)
    panel.grid(color="0.92", which="major")
    panel.legend(fontsize=8, frameon=False, ncols=2)


def _covered_at(row: ModuleCoverage, shares: torch.Tensor) -> torch.Tensor:
    """A module's covered energy at shares of its dimensions; constant beyond its own k."""
    return row.curve[(shares * row.features).round().long().clamp(1, min(row.k, len(row.curve))) - 1]


def _draw_ranks(panel: Any, modules: Modules) -> None:
    """Bars per kind: dimensions of the null space, of the task's inputs, and of the task's inputs outside."""
    groups = _kinds(modules)
    bars: list[tuple[str, str, Figure]] = [
        ("null space (k)", "#999999", lambda row: row.k),
        (f"task, {TASK_ENERGY:.0%} of its energy", render.PALETTE[0], _of_task("rank")),
        (f"{TASK_ENERGY:.0%} of what is left of it outside", render.PALETTE[1], _of_task("rank_free")),
    ]
    for offset, (label, color, figure) in enumerate(bars):
        heights = [100 * (_median(rows, figure) or 0) / rows[0].features for rows in groups.values()]
        places = [place + 0.27 * (offset - 1) for place in range(len(groups))]
        panel.bar(places, heights, width=0.25, color=color, label=label)
    panel.set_ylim(top=1.35 * panel.get_ylim()[1])  # room for the legend
    panel.set_xticks(range(len(groups)), list(groups), rotation=30, ha="right")
    panel.set_ylabel("% of the input dimensions (medians)", fontsize=9)
    panel.set_title("Directions taken, and directions that the task needs", fontsize=9)
    panel.grid(axis="y", color="0.92")
    panel.set_axisbelow(True)
    panel.legend(fontsize=8, frameon=False)


def _of_task(name: str) -> Figure:
    """A field of `TaskShare`; None without task data."""
    return lambda row: getattr(row.task, name, None)


def _with_task(modules: Modules) -> bool:
    return any(row.task is not None for row in modules)


def _kinds(modules: Modules) -> dict[str, list[ModuleCoverage]]:
    """The modules by the last part of their name, in order of first appearance."""
    groups: dict[str, list[ModuleCoverage]] = {}
    for row in modules:
        groups.setdefault(kind_of(row.name), []).append(row)
    return groups


def _known(rows: Modules, figure: Figure) -> list[float]:
    return [value for value in map(figure, rows) if value is not None]


def _median(rows: Modules, figure: Figure) -> float | None:
    known = _known(rows, figure)
    return statistics.median(known) if known else None


def _span(rows: Modules, figure: Figure) -> str:
    values = sorted(set(_known(rows, figure)))
    return f"{values[0]}" if len(values) == 1 else f"{values[0]}-{values[-1]}"


def _median_and_least(rows: Modules, figure: Figure) -> list[str]:
    return [render.number(_median(rows, figure), ".4f"), render.number(min(_known(rows, figure), default=None), ".2g")]
