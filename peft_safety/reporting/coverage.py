"""What a calibration will take, as a table; and what its input bases cover, as a table, as JSON and as a picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from peft_safety.calibration.cost import CalibrationCost
from peft_safety.calibration.coverage import TASK_ENERGY, ModuleCoverage
from peft_safety.core.names import lines
from peft_safety.errors import DataError
from peft_safety.reporting import render, style

Row = dict[str, Any]
TASK = ("free", "rank", "rank_free")
"""What a row says of the task."""
GRID = 64
"""Points of a drawn curve."""
FLOOR = 1e-5
"""Lower end of the picture: smaller shares are rounding noise of the moments."""
COST_NOTE = (
    "Times are rough: passes from one batch that was run, decompositions from counted operations. With an energy, the "
    "file is at most so large."
)
COVERED_NOTE = "covered: share of the calibration inputs' energy inside the null space; the update does not see it."
TASK_NOTE = (
    f"task: share of its inputs' energy that the update still sees, and the directions that hold {TASK_ENERGY:.0%} of "
    "them, in all and outside."
)
MIDDLE = (0.1, 0.9)
"""Quantiles of the modules at the edges of a band."""


def show_cost(cost: CalibrationCost) -> None:
    rows = [
        ["modules", f"{cost.modules}, with {cost.inputs} distinct inputs"],
        ["subspace file", size_text(cost.file_bytes)],
        ["memory beside the model", f"{size_text(cost.memory_bytes)}, {size_text(cost.budget_bytes)} allowed"],
        ["passes over the data", f"{cost.passes}, {cost.tokens} tokens in all"],
        ["time of the passes", f"{cost.pass_seconds:.3g} s"],
        ["time of the decompositions", f"{cost.decomposition_seconds:.3g} s"],
    ]
    render.show("What this calibration will take (nothing written)", render.table(["", ""], rows), notes=[COST_NOTE])


def size_text(count: int) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def to_json(modules: Sequence[ModuleCoverage]) -> list[Row]:
    rows = []
    for module in modules:
        row = {name: getattr(module, name) for name in ("name", "features", "k", "covered")}
        task = module.task
        rows.append(row | ({} if task is None else {f"task_{name}": getattr(task, name) for name in TASK}))
    return rows


def show(modules: Sequence[ModuleCoverage]) -> None:
    """Print medians by kind of module, with the smallest values."""
    rows = to_json(modules)
    task = bool(_known(rows, "task_free"))
    headings = ["module", "inputs", "k", "covered", "(least)"]
    headings += ["task:\nseen", "(least)", "rank", "rank\noutside"] if task else []
    table = []
    for label, group in lines(rows, lambda row: str(row["name"]), every=False):
        cells = [label, *(render.span(row[name] for row in group) for name in ("features", "k"))]
        for name in ("covered", "task_free") if task else ("covered",):
            least = min(_known(group, name), default=None)
            cells += [render.number(_median(group, name), ".4f"), render.number(least, ".2g")]
        for name in ("task_rank", "task_rank_free") if task else ():
            cells.append(render.number(_median(group, name), ".0f"))
        table.append(cells)
    title = f"Null spaces of {len(modules)} modules, by kind (medians)"
    render.show(title, render.table(headings, table), notes=[COVERED_NOTE, *([TASK_NOTE] if task else [])])


def save_png(modules: Sequence[ModuleCoverage], path: str | Path) -> Path:
    """Share of the energy outside of the null space, which the update still sees, by the size of the null space: of
    the calibration data and, with task data, of the task.
    """
    known = [module for module in modules if len(module.curve)]
    if not known:
        raise DataError("the subspace does not say what its input bases cover. Calibrate with method='guardspace'.")
    curves = {"calibration data": [(1 - module.curve, module.features) for module in known]}
    tasks = [(m.task.curve, m.features) for m in known if m.task is not None and len(m.task.curve)]
    curves |= {"the task": tasks} if tasks else {}
    title = "Energy that the update still sees, by the size of the null space"
    note = f"Medians of {len(known)} modules; bands: the middle {MIDDLE[1] - MIDDLE[0]:.0%} of them."
    with style.picture(path, 3.0, title=title, note=note) as (_, (panel,)):
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter("")
        colors = style.INK, style.color_of("guardspace")
        ends = [_draw_energy(panel, *curve, color) for curve, color in zip(curves.items(), colors, strict=False)]
        panel.set_ylim(100 * FLOOR if panel.get_ylim()[0] < 100 * FLOOR else None, 130)
        panel.set_xlabel("k, % of the input dimensions")
        panel.set_ylabel("energy outside, %")
        panel.grid(which="major")
        style.label_points(panel, ends)
    return Path(path)


def _draw_energy(panel: Any, name: str, curves: Sequence[tuple[torch.Tensor, int]], color: str) -> style.Label:
    """The median over modules with a band, against the share of dimensions taken; returns the label of its end."""
    first = min(1 / features for _, features in curves)
    shares = torch.linspace(first, max(len(curve) / features for curve, features in curves), GRID)
    outside = torch.stack([_at(curve, shares * features) for curve, features in curves]).double().clamp(min=FLOOR)
    low, middle, high = ((100 * outside.quantile(q, dim=0)).tolist() for q in (MIDDLE[0], 0.5, MIDDLE[1]))
    across = (100 * shares).tolist()
    panel.fill_between(across, low, high, color=color, alpha=0.15, lw=0)
    panel.plot(across, middle, color=color, lw=2)
    return across[-1], middle[-1], f"{name}:\n{middle[-1]:.2g} %", color


def _at(curve: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """A module's curve at sizes of its null space; constant beyond its own k."""
    return curve[sizes.round().long().clamp(1, len(curve)) - 1]


def _known(rows: list[Row], name: str) -> list[float]:
    return [row[name] for row in rows if row.get(name) is not None]


def _median(rows: list[Row], name: str) -> float | None:
    known = _known(rows, name)
    return statistics.median(known) if known else None
