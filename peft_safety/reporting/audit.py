"""An orthogonality report as a table and as a picture (its JSON is `OrthogonalityReport.to_json`)."""

from __future__ import annotations

import math
from pathlib import Path
from textwrap import wrap
from typing import Any

from peft_safety.audit.report import FIGURES, ModuleOrthogonality, OrthogonalityReport, medians
from peft_safety.core.names import listed
from peft_safety.reporting import render, style

INPUT_SIDE = ("effective_rank", "relative_norm", "metric", "metric_null", "z", "angle", "energy", "energy_ratio")
"""Figures of the first table: size, and where the update lies on the input side."""
FUNCTIONAL = ("general", "harmful", "interference_ratio")
NOTES = (
    "metric: largest entry between the top-8 right singular vectors of dW and of W (arXiv 2510.09004); null and z: "
    "the same for random subspaces.",
    "angle: smallest principal angle of those two, in degrees. energy: share of |dW|^2 inside W's top-k right "
    "singular vectors; chance is k/n.",
    "out: the same on the output side, with left singular vectors.",
)
FUNCTIONAL_NOTE = (
    "general, harmful: E|dW x| / E|W x| on such inputs; ratio: general over harmful, below 1 where the update acts on "
    "harmful inputs more."
)
UNMEASURED_NOTE = (
    "What the update does to general and harmful inputs was not measured: give calibration data (--calibration auto)."
)
NAME = 20
"""Columns of a line of another adapter's name."""
LARGEST_RATIO = 100.0
"""Largest ratio of the color scale: an exactly orthogonal update has the ratio 0."""
SMALLEST_RATIO, SMALLEST_Z = 2.0, 3.0
"""Smallest ends of the color scales, so that chance does not look like a pattern."""
TICKS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


def show(report: OrthogonalityReport, every_module: bool = False) -> None:
    """Print medians by kind of module and over all, or one row a module: first a table of the input side, below it the
    output side, what the update does to inputs, and overlaps with other adapters.
    """
    columns = {name: column[1:] for name, column in FIGURES.items() if report.measured or name not in FUNCTIONAL}
    columns |= {
        f"overlap:{other}": ("\n".join(["overlap with", *wrap(other, NAME)]), ".2g") for other in report.others
    }
    if every_module:
        groups = [(row.name if row.layer is None else f"{row.layer}.{row.kind}", [row]) for row in report.modules]
    else:
        kinds = [*report.kinds.items(), ("all", list(report.modules))]
        groups = [(f"{kind} ({len(modules)})", modules) for kind, modules in kinds]
    figures = [(label, medians(modules, report.others)) for label, modules in groups]
    tables = []
    for part in (INPUT_SIDE, [name for name in columns if name not in INPUT_SIDE]):
        rows = [[label, *(render.number(row[name], columns[name][1]) for name in part)] for label, row in figures]
        tables += render.tables(["module", *(columns[name][0] for name in part)], rows)
    zeros = sum(row.rank == 0 for row in report.modules)
    notes = [*NOTES, FUNCTIONAL_NOTE if report.measured else UNMEASURED_NOTE]
    notes += [f"{zeros} of {len(report.modules)} modules have a zero update and no figures."] if zeros else []
    notes += [f"not compared: {reason}" for reason in report.environment.get("not_compared", {}).values()]
    others = report.environment.get("unconstrained", ())
    notes += [f"Trained too, and in no figure here: {listed(others)}."] if others else []
    what = "every module" if every_module else "medians by kind of module"
    title = (
        f"Orthogonality of {report.adapter!r}: {len(report.modules)} modules, k = {report.environment['k']} ({what})"
    )
    render.show(title, *tables, notes=notes)


PANELS = {
    "z": "published metric\nz-score against its null",
    "energy_ratio": "energy in W's top-k,\ninput side / chance",
    "left_energy_ratio": "energy in W's top-k,\noutput side / chance",
    "interference_ratio": "interference,\ngeneral / harmful inputs",
}
"""Figure of a heat map -> its title. Ratios have a logarithmic scale around 1, z a linear one around 0."""


def save_png(report: OrthogonalityReport, path: str | Path) -> Path:
    """Heat maps of layers by kinds of module; white is chance (or equal interference), gray is no figure."""
    panels = list(PANELS)[: 4 if report.measured else 3]
    kinds, layers = list(report.kinds), sorted({_layer(row) for row in report.modules})
    step = math.ceil(len(layers) / 8)
    names = ["none" if layer < 0 else str(layer) for layer in layers[::step]]
    model = report.environment.get("model")
    white = "chance, or as much on general as on harmful inputs" if report.measured else "chance"
    of = f" ({model})" if model else ""
    title = f"Where the update of {report.adapter!r} lies{of}, k = {report.environment['k']}"
    height = 2 * (1.6 + 0.05 * min(32, max(len(layers), 8)))
    note = f"White: {white}. Gray: no figure."
    with style.picture(path, height, len(panels), 2, title, note, sharex=True, sharey=True) as (canvas, axes):
        for axis, name in zip(axes, panels, strict=True):
            _draw(canvas, axis, name, report, layers)
            axis.tick_params(length=0, labelbottom=True)
            axis.set_xticks(range(len(kinds)), kinds, rotation=45, ha="right", rotation_mode="anchor")
            axis.set_yticks(range(0, len(layers), step), names)
        for axis in axes[::2]:
            axis.set_ylabel("layer")
    return Path(path)


def _layer(row: ModuleOrthogonality) -> int:
    return -1 if row.layer is None else row.layer


def _draw(canvas: Any, axis: Any, name: str, report: OrthogonalityReport, layers: list[int]) -> None:
    import numpy as np
    from matplotlib.colors import LogNorm, Normalize

    ratio = name != "z"
    grid = np.full((len(layers), len(report.kinds)), np.nan)
    for column, rows in enumerate(report.kinds.values()):
        for row in rows:
            grid[layers.index(_layer(row)), column] = FIGURES[name][0](row)
    drawn = np.clip(grid, 1 / LARGEST_RATIO, LARGEST_RATIO) if ratio else grid
    if ratio:
        high = math.exp(np.nanmax(np.abs(np.log(drawn)), initial=math.log(SMALLEST_RATIO)))
        norm: Any = LogNorm(1 / high, high)
    else:
        high = float(np.nanmax(np.abs(drawn), initial=SMALLEST_Z))
        norm = Normalize(-high, high)
    colors = style.ramp(style.color_of("guardspace"), "#FFFFFF", style.color_of("lora"))
    image = axis.imshow(np.ma.masked_invalid(drawn), cmap=colors, norm=norm, aspect="auto", interpolation="nearest")
    extend = "neither" if np.array_equal(drawn, grid, equal_nan=True) else "both"
    bar = canvas.colorbar(image, ax=axis, location="right", extend=extend, pad=0.02, aspect=18)
    if ratio:
        ticks = [0.5, 1, 2] if high < 3 else [tick for tick in TICKS if abs(math.log(tick)) <= math.log(high) + 1e-6]
        bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
        bar.ax.minorticks_off()
    bar.outline.set_visible(False)
    axis.set_title(PANELS[name])
    axis.spines[:].set_visible(False)
