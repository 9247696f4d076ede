"""An orthogonality report as a table and as a picture (its JSON is `OrthogonalityReport.to_json`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_safety.audit.report import ModuleOrthogonality, OrthogonalityReport, medians
from peft_safety.reporting.render import print_wide, save_figure

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = {
    "effective_rank": ("eff.\nrank", ".3g"),
    "relative_norm": ("|dW|\n/|W|", ".2g"),
    "metric": ("\nmetric", ".3f"),
    "metric_null": ("\nnull", ".3f"),
    "z": ("\nz", ".1f"),
    "angle": ("\nangle", ".1f"),
    "energy": ("\nenergy", ".2g"),
    "energy_ratio": ("energy\n/ chance", ".2f"),
    "left_z": ("out:\nz", ".1f"),
    "left_energy_ratio": ("out:\n/ chance", ".2f"),
    "general": ("\ngeneral", ".2g"),
    "harmful": ("\nharmful", ".2g"),
    "interference_ratio": ("\nratio", ".2f"),
}
"""Figure -> its heading and format."""
FUNCTIONAL = ("general", "harmful", "interference_ratio")
NOTES = (
    "metric: largest entry between the top-8 right singular vectors of dW and of W (arXiv 2510.09004); null and z: "
    "the same for random subspaces.",
    "angle: smallest principal angle of those two, in degrees. energy: share of |dW|^2 inside W's top-k right "
    "singular vectors; chance is k/n.",
    "out: the same on the output side, with left singular vectors.",
)
FUNCTIONAL_NOTE = (
    "general, harmful: E|dW x| / E|W x| on such inputs; ratio: general over harmful, below 1 where "
    "the update acts on harmful inputs more."
)
UNMEASURED_NOTE = (
    "What the update does to general and harmful inputs was not measured: give calibration data (--calibration auto)."
)
LARGEST_RATIO = 100.0
"""Largest ratio of the color scale: an exactly orthogonal update has the ratio 0."""
SMALLEST_RATIO, SMALLEST_Z = 2.0, 3.0
"""Smallest ends of the color scales, so that chance does not look like a pattern."""
TINY = 1e-300


def table(report: OrthogonalityReport, every_module: bool = False) -> Table:
    """Medians by kind of module and over all; or one row a module."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    columns = {name: column for name, column in COLUMNS.items() if report.measured or name not in FUNCTIONAL}
    columns |= {f"overlap:{other}": (f"overlap with\n{other}", ".2g") for other in report.others}
    zeros = sum(row.rank == 0 for row in report.modules)
    notes = [*NOTES, FUNCTIONAL_NOTE if report.measured else UNMEASURED_NOTE]
    notes += [f"{zeros} of {len(report.modules)} modules have a zero update and no figures."] if zeros else []
    notes += [f"not compared: {reason}" for reason in report.environment.get("not_compared", {}).values()]
    what = "every module" if every_module else "medians by kind of module"
    shown = Table(
        title=f"Orthogonality of {report.adapter!r}: {len(report.modules)} modules, k = "
        f"{report.environment['k']} ({what})",
        caption="\n".join(notes),
        caption_justify="left",
        box=SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    shown.add_column("\nmodule", no_wrap=True)
    for heading, _ in columns.values():
        shown.add_column(heading, justify="right", no_wrap=True)
    for label, figures in _lines(report, every_module):
        shown.add_row(label, *(_cell(figures[name], form) for name, (_, form) in columns.items()))
    return shown


def show(report: OrthogonalityReport, every_module: bool = False) -> None:
    """Print the table to stdout."""
    print_wide(table(report, every_module))


def _cell(value: float, form: str) -> str:
    if math.isnan(value):
        return "-"
    text = format(value, form)
    return text if float(text) else text.lstrip("-")


def _lines(report: OrthogonalityReport, every_module: bool) -> list[tuple[str, Mapping[str, float]]]:
    if every_module:
        return [
            (row.name if row.layer is None else f"{row.layer}.{row.kind}", medians([row], report.others))
            for row in report.modules
        ]
    lines = [(f"{kind} ({len(rows)})", medians(rows, report.others)) for kind, rows in report.kinds.items()]
    return [*lines, (f"all ({len(report.modules)})", report.summary)]


@dataclass(frozen=True)
class _Panel:
    """One heat map: `ratio` ones have a logarithmic scale around 1, the others a linear one around 0."""

    title: str
    figure: Callable[[ModuleOrthogonality], float]
    ratio: bool


PANELS = (
    _Panel("published metric\nz-score against its null", lambda row: row.right.z, False),
    _Panel("energy in W's top-k,\ninput side / chance", lambda row: row.right.energy_ratio, True),
    _Panel("energy in W's top-k,\noutput side / chance", lambda row: row.left.energy_ratio, True),
)
FUNCTIONAL_PANEL = _Panel("interference,\ngeneral / harmful inputs", lambda row: row.interference_ratio, True)


def save_png(report: OrthogonalityReport, path: str | Path) -> Path:
    """Heat maps of layers by kinds of module; white is chance (or equal interference), gray is no figure."""
    from matplotlib.figure import Figure

    panels = [*PANELS, FUNCTIONAL_PANEL] if report.measured else list(PANELS)
    kinds, layers = list(report.kinds), sorted({_layer(row) for row in report.modules})
    width, height = 1.1 + len(panels) * (0.9 + 0.3 * len(kinds)), 2.1 + 0.2 * max(len(layers), 8)
    canvas = Figure(figsize=(width, height), layout="constrained")
    axes = canvas.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, panel in zip(axes, panels, strict=True):
        _draw(canvas, axis, panel, report, layers)
        axis.set_xticks(range(len(kinds)), kinds, rotation=60, ha="right", rotation_mode="anchor", fontsize=7)
    step = max(1, math.ceil(len(layers) / 16))
    axes[0].set_yticks(
        range(0, len(layers), step), ["none" if layer < 0 else str(layer) for layer in layers[::step]], fontsize=7
    )
    axes[0].set_ylabel("layer", fontsize=8)
    model = report.environment.get("model")
    white = "chance, or as much on general as on harmful inputs" if report.measured else "chance"
    title = (
        f"Orthogonality of {report.adapter!r}{f' on {model}' if model else ''}, k = "
        f"{report.environment['k']}. White: {white}. Gray: no figure."
    )
    canvas.suptitle(title, fontsize=9)
    return save_figure(canvas, path)


def _layer(row: ModuleOrthogonality) -> int:
    return -1 if row.layer is None else row.layer


def _draw(canvas: Any, axis: Any, panel: _Panel, report: OrthogonalityReport, layers: list[int]) -> None:
    """One panel with its color bar."""
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm, Normalize

    grid = np.full((len(layers), len(report.kinds)), np.nan)
    for column, rows in enumerate(report.kinds.values()):
        for row in rows:
            grid[layers.index(_layer(row)), column] = panel.figure(row)
    values = grid[np.isfinite(grid)]
    if panel.ratio:
        inside = np.clip(values, 1 / LARGEST_RATIO, LARGEST_RATIO)
        high = float(np.exp(max(np.abs(np.log(inside)).max(initial=0.0), math.log(SMALLEST_RATIO))))
        norm: Any = LogNorm(1 / high, high)
        below, above = (values < 1 / LARGEST_RATIO).any(), (values > LARGEST_RATIO).any()
        grid = np.where(grid <= 0, TINY, grid)  # the logarithm of 0 would be drawn as missing
    else:
        high = float(max(np.abs(values).max(initial=0.0), SMALLEST_Z))
        norm, below, above = Normalize(-high, high), False, False
    colors = colormaps["RdBu_r"].with_extremes(bad="0.8")
    image = axis.imshow(np.ma.masked_invalid(grid), cmap=colors, norm=norm, aspect="auto", interpolation="nearest")
    extend = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}[
        bool(below), bool(above)
    ]
    bar = canvas.colorbar(image, ax=axis, location="bottom", extend=extend, pad=0.02, aspect=14)
    if panel.ratio:
        decades = [
            value
            for value in (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
            if abs(math.log(value)) <= math.log(high) + 1e-6
        ]
        ticks = [0.5, 1, 2] if high < 3 else decades
        bar.set_ticks(ticks, labels=[f"{value:g}" for value in ticks])
        bar.ax.minorticks_off()
    bar.ax.tick_params(labelsize=7)
    axis.set_title(panel.title, fontsize=8)
    axis.tick_params(length=2)
