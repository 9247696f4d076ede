"""What a calibration will take, as a table; and what its input bases cover, as a table, as JSON and as a picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from peft_safety.calibration.cost import CalibrationCost
from peft_safety.calibration.coverage import TASK_ENERGY, ModuleCoverage
from peft_safety.calibration.sizes import kind_of
from peft_safety.errors import DataError
from peft_safety.reporting import render

Row = dict[str, Any]
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
BARS = {
    "k": ("null space (k)", "#999999"),
    "task_rank": (f"task, {TASK_ENERGY:.0%} of its energy", render.PALETTE[0]),
    "task_rank_free": (f"{TASK_ENERGY:.0%} of what is left of it outside", render.PALETTE[1]),
}
"""Figure -> its label and color."""


def show_cost(cost: CalibrationCost) -> None:
    rows = [
        ["modules", f"{cost.modules}, with {cost.inputs} distinct inputs"],
        ["subspace file", _size(cost.file_bytes)],
        ["memory beside the model", f"{_size(cost.memory_bytes)}, {_size(cost.budget_bytes)} allowed"],
        ["passes over the data", f"{cost.passes}, {cost.tokens} tokens in all"],
        ["time of the passes", f"{cost.pass_seconds:.3g} s"],
        ["time of the decompositions", f"{cost.decomposition_seconds:.3g} s"],
    ]
    render.show("What this calibration will take (nothing written)", render.table(["", ""], rows), notes=[COST_NOTE])


def _size(count: int) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def to_json(modules: Sequence[ModuleCoverage]) -> list[Row]:
    rows = []
    for module in modules:
        row = {name: getattr(module, name) for name in ("name", "features", "k", "covered")}
        task = module.task
        rows.append(row | ({} if task is None else {f"task_{name}": value for name, value in vars(task).items()}))
    return rows


def show(modules: Sequence[ModuleCoverage]) -> None:
    """Print medians by kind of module, with the smallest values."""
    rows = to_json(modules)
    task = bool(_known(rows, "task_free"))
    headings = ["module", "inputs", "k", "covered", "(least)"]
    headings += ["task:\nseen", "(least)", "rank", "rank\noutside"] if task else []
    lines = []
    for kind, group in [*_by_kind(rows).items(), ("all", rows)]:
        cells = [f"{kind} ({len(group)})", _span(group, "features"), _span(group, "k")]
        for name in ("covered", "task_free") if task else ("covered",):
            least = min(_known(group, name), default=None)
            cells += [render.number(_median(group, name), ".4f"), render.number(least, ".2g")]
        for name in ("task_rank", "task_rank_free") if task else ():
            cells.append(render.number(_median(group, name), ".0f"))
        lines.append(cells)
    title = f"Null spaces of {len(modules)} modules, by kind (medians)"
    render.show(title, render.table(headings, lines), notes=[COVERED_NOTE, *([TASK_NOTE] if task else [])])


def save_png(modules: Sequence[ModuleCoverage], path: str | Path) -> Path:
    """Energy left outside against the size of the null space, with task data its rank beside k, by kind of module."""
    if not any(len(module.curve) for module in modules):
        raise DataError("the subspace does not say what its input bases cover. Calibrate with method='guardspace'.")
    rows = to_json(modules)
    task = bool(_known(rows, "task_free"))
    canvas, panels = render.figure(11.5 if task else 6.2, 4.2, 1 + task)
    _draw_energy(panels[0], [row | {"curve": module.curve} for row, module in zip(rows, modules, strict=True)])
    if task:
        _draw_ranks(panels[1], rows)
    return render.save_figure(canvas, path)


def _draw_energy(panel: Any, rows: list[Row]) -> None:
    """One line per kind: median energy outside the first k directions; a cross marks the task."""
    for index, (kind, group) in enumerate(_by_kind([row for row in rows if len(row["curve"])]).items()):
        color = render.PALETTE[index % len(render.PALETTE)]
        sizes = [row["k"] / row["features"] for row in group]
        shares = torch.linspace(min(1 / row["features"] for row in group), max(sizes), GRID)
        outside = 1 - torch.stack([_covered_at(row, shares) for row in group]).median(dim=0).values
        panel.plot((100 * shares).tolist(), outside.clamp(min=FLOOR).tolist(), color=color, label=kind, linewidth=1.6)
        if _known(group, "task_free"):
            place = [100 * min(sizes)], [_median(group, "task_free")]
            panel.plot(*place, "x", color=color, markersize=7, markeredgewidth=2)
    panel.set_yscale("log")
    panel.set_ylim(bottom=FLOOR)
    panel.set_xlabel("k, % of the input dimensions", fontsize=9)
    panel.set_ylabel("share of energy outside", fontsize=9)
    crosses = "; crosses: the task" if _known(rows, "task_free") else ""
    panel.set_title(f"What the update still sees (lines: calibration data{crosses})", fontsize=9)
    panel.grid(color="0.92", which="major")
    panel.legend(fontsize=8, frameon=False, ncols=2)


def _covered_at(row: Row, shares: torch.Tensor) -> torch.Tensor:
    """A module's covered energy at shares of its dimensions; constant beyond its own k."""
    curve: torch.Tensor = row["curve"]
    return curve[(shares * row["features"]).round().long().clamp(1, len(curve)) - 1]


def _draw_ranks(panel: Any, rows: list[Row]) -> None:
    """Bars per kind: dimensions of the null space, of the task's inputs, and of the task's inputs outside."""
    groups = _by_kind(rows)
    for offset, (name, (label, color)) in enumerate(BARS.items()):
        heights = [100 * (_median(group, name) or 0) / group[0]["features"] for group in groups.values()]
        places = [place + 0.27 * (offset - 1) for place in range(len(groups))]
        panel.bar(places, heights, width=0.25, color=color, label=label)
    panel.set_ylim(top=1.35 * panel.get_ylim()[1])  # room for the legend
    panel.set_xticks(range(len(groups)), list(groups), rotation=30, ha="right")
    panel.set_ylabel("% of the input dimensions (medians)", fontsize=9)
    panel.set_title("Directions taken, and directions that the task needs", fontsize=9)
    panel.grid(axis="y", color="0.92")
    panel.set_axisbelow(True)
    panel.legend(fontsize=8, frameon=False)


def _by_kind(rows: list[Row]) -> dict[str, list[Row]]:
    """The rows by the last part of their name, in order of first appearance."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(kind_of(row["name"]), []).append(row)
    return groups


def _known(rows: list[Row], name: str) -> list[float]:
    return [row[name] for row in rows if row.get(name) is not None]


def _span(rows: list[Row], name: str) -> str:
    values = _known(rows, name)
    return "-".join(str(value) for value in sorted({min(values), max(values)}))


def _median(rows: list[Row], name: str) -> float | None:
    known = _known(rows, name)
    return statistics.median(known) if known else None
