"""Coverage of input bases as a table, as JSON and as a picture."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from peft_safety.calibration.coverage import TASK_ENERGY, ModuleCoverage
from peft_safety.errors import DataError
from peft_safety.reporting.render import PALETTE, print_wide, save_figure

if TYPE_CHECKING:
    from rich.table import Table

GRID = 64
"""Points of a drawn curve."""
FLOOR = 1e-5
"""Lower end of the picture: smaller shares are rounding noise of the moments."""


def kinds(modules: Sequence[ModuleCoverage]) -> dict[str, list[ModuleCoverage]]:
    """The modules by the last part of their name, in order of first appearance."""
    return {kind: [row for row in modules if row.kind == kind] for kind in dict.fromkeys(row.kind for row in modules)}


def to_json(modules: Sequence[ModuleCoverage]) -> list[dict[str, Any]]:
    """Plain values, one object a module."""
    return [
        {
            "name": row.name,
            "features": row.features,
            "k": row.k,
            "covered": row.covered,
            **(
                {}
                if row.task is None
                else {"task_free": row.task.free, "task_rank": row.task.rank, "task_rank_free": row.task.rank_free}
            ),
        }
        for row in modules
    ]


def table(modules: Sequence[ModuleCoverage]) -> Table:
    """Medians by kind of module, with the smallest values."""
    from rich.table import Table

    with_task = any(row.task is not None for row in modules)
    notes = ["covered: share of the calibration inputs' energy inside the null space; the update does not see it."]
    if with_task:
        notes.append(
            "task: share of its inputs' energy that the update still sees, and the directions that hold "
            f"{TASK_ENERGY:.0%} of them, in all and outside."
        )
    shown = Table(
        title=f"Null spaces of {len(modules)} modules, by kind (medians)",
        caption="\n".join(notes),
        title_justify="left",
        caption_justify="left",
    )
    headings = ["module", "inputs", "k", "covered", "(least)"] + (
        ["task: seen", "(least)", "rank", "rank outside"] if with_task else []
    )
    for heading in headings:
        shown.add_column(heading, justify="left" if heading == "module" else "right", no_wrap=True)
    for kind, rows in [*kinds(modules).items(), ("all", list(modules))]:
        cells = [f"{kind} ({len(rows)})", _span(rows, lambda row: row.features), _span(rows, lambda row: row.k)]
        cells += _pair([row.covered for row in rows if row.covered is not None])
        if with_task:
            tasks = [row.task for row in rows if row.task is not None]
            ranks = [_middle([getattr(task, name) for task in tasks]) for name in ("rank", "rank_free")]
            cells += [*_pair([task.free for task in tasks]), *ranks]
        shown.add_row(*cells)
    return shown


def show(modules: Sequence[ModuleCoverage]) -> None:
    """Print the table to stdout."""
    print_wide(table(modules))


def save_png(modules: Sequence[ModuleCoverage], path: str | Path) -> Path:
    """Energy left outside against the size of the null space, and with task data the task's rank beside k, by kind of
    module.

    Raises:
        DataError: no module, or bases that do not say what they cover.
    """
    from matplotlib.figure import Figure

    if not any(len(row.curve) for row in modules):
        raise DataError(
            "the subspace does not say what its input bases cover, so there is nothing to draw. Calibrate with "
            "method='guardspace'."
        )
    with_task = any(row.task is not None for row in modules)
    canvas = Figure(figsize=(11.5 if with_task else 6.2, 4.2), layout="constrained")
    panels = canvas.subplots(1, 1 + with_task, squeeze=False)[0]
    _draw_energy(panels[0], modules)
    if with_task:
        _draw_ranks(panels[1], modules)
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8)
    return save_figure(canvas, path)


def _draw_energy(panel: Any, modules: Sequence[ModuleCoverage]) -> None:
    """One line per kind: median energy outside the first k directions; a cross marks the task."""
    for index, (kind, rows) in enumerate(kinds(modules).items()):
        drawn = [row for row in rows if len(row.curve)]
        if not drawn:
            continue
        color = PALETTE[index % len(PALETTE)]
        largest = min(row.k / row.features for row in drawn)
        shares = torch.linspace(
            min(1 / row.features for row in drawn), max(row.k / row.features for row in drawn), GRID
        )
        lines = torch.stack([_at(row, shares) for row in drawn])
        outside = (1 - lines).median(dim=0).values.clamp(min=FLOOR)
        panel.plot((100 * shares).tolist(), outside.tolist(), color=color, label=kind, linewidth=1.6)
        free = [row.task.free for row in drawn if row.task is not None]
        if free:
            panel.plot([100 * largest], [statistics.median(free)], "x", color=color, markersize=7, markeredgewidth=2)
    panel.set_yscale("log")
    panel.set_ylim(bottom=FLOOR)
    panel.set_xlabel("k, % of the input dimensions", fontsize=9)
    panel.set_ylabel("share of energy outside", fontsize=9)
    crosses = "; crosses: the task" if any(row.task is not None for row in modules) else ""
    panel.set_title(f"What the update still sees (lines: calibration data{crosses})", fontsize=9)
    panel.grid(color="0.92", which="major")
    panel.legend(fontsize=8, frameon=False, ncols=2)


def _at(row: ModuleCoverage, shares: torch.Tensor) -> torch.Tensor:
    """A module's covered energy at shares of its dimensions; constant beyond its own k."""
    index = (shares * row.features).round().long().clamp(1, row.k) - 1
    return row.curve[index.clamp(max=len(row.curve) - 1)]


def _draw_ranks(panel: Any, modules: Sequence[ModuleCoverage]) -> None:
    """Bars per kind: dimensions of the null space, of the task's inputs, and of the task's inputs outside."""
    groups = kinds(modules)
    bars: tuple[tuple[str, str, Callable[[ModuleCoverage], int | None]], ...] = (
        ("null space (k)", "#999999", lambda row: row.k),
        (f"task, {TASK_ENERGY:.0%} of its energy", PALETTE[0], lambda row: row.task.rank if row.task else None),
        (
            f"{TASK_ENERGY:.0%} of what is left of it outside",
            PALETTE[1],
            lambda row: row.task.rank_free if row.task else None,
        ),
    )
    for offset, (label, color, figure) in enumerate(bars):
        values = [[value for row in rows if (value := figure(row)) is not None] for rows in groups.values()]
        heights = [
            100 * statistics.median(known) / rows[0].features if known else 0
            for known, rows in zip(values, groups.values(), strict=True)
        ]
        panel.bar(
            [place + 0.27 * (offset - 1) for place in range(len(groups))],
            heights,
            width=0.25,
            color=color,
            label=label,
        )
    panel.set_ylim(top=1.35 * panel.get_ylim()[1])  # room for the legend
    panel.set_xticks(range(len(groups)), list(groups), rotation=30, ha="right")
    panel.set_ylabel("% of the input dimensions (medians)", fontsize=9)
    panel.set_title("Directions taken, and directions that the task needs", fontsize=9)
    panel.grid(axis="y", color="0.92")
    panel.set_axisbelow(True)
    panel.legend(fontsize=8, frameon=False)


def _span(rows: Sequence[ModuleCoverage], figure: Callable[[ModuleCoverage], int]) -> str:
    values = sorted({figure(row) for row in rows})
    return str(values[0]) if len(values) == 1 else f"{values[0]}-{values[-1]}"


def _pair(values: Sequence[float]) -> list[str]:
    return [f"{statistics.median(values):.4f}", f"{min(values):.2g}"] if values else ["-", "-"]


def _middle(values: Sequence[int | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.median(known):.0f}" if known else "-"
