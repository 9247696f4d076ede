"""A Safe LoRA repair as a table and as a picture (its JSON is `RepairReport.to_json`)."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

from peft_safety.methods.safe_lora import RepairReport
from peft_safety.reporting.render import save_figure

if TYPE_CHECKING:
    from rich.table import Table


def table(report: RepairReport) -> Table:
    """One row a module."""
    from rich.table import Table

    record = report.record
    shown = Table(
        title=f"Safe LoRA ({record['projection']}, {record['select']}): {record['repaired']} of "
        f"{record['modules']} modules repaired",
        caption="cos: between the update and its projection. gain: length left if repaired. |V|/|W|: what "
        "alignment changed, relative to the weight.",
        caption_justify="left",
    )
    for heading in ("module", "cos", "repaired", "gain", "norm left", "|V|/|W|"):
        shown.add_column(heading, justify="left" if heading in ("module", "repaired") else "right", overflow="fold")
    for row in report.modules:
        repaired = "yes" if row.selected else ""
        shown.add_row(row.name, _number(row.cos), repaired, *map(_number, (row.gain, row.kept_norm, row.delta)))
    return shown


def save_png(report: RepairReport, path: str | Path) -> Path:
    """Cosine by layer, one line per kind of module; repaired modules are filled; with the threshold, if any."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(8, 4.2), layout="constrained")
    axes = canvas.subplots()
    kinds: dict[str, list[tuple[int, float, bool]]] = {}
    for index, row in enumerate(report.modules):
        number = re.search(r"\.(\d+)\.", row.name)
        if not math.isnan(row.cos):
            point = (int(number.group(1)) if number else index, row.cos, row.selected)
            kinds.setdefault(row.name.rpartition(".")[2], []).append(point)
    for color, (kind, points) in enumerate(sorted(kinds.items())):
        points.sort()
        layers, cosines, _ = zip(*points, strict=True)
        axes.plot(layers, cosines, linewidth=1, color=f"C{color % 10}", label=kind)
        for layer, cosine, selected in points:
            fill = "full" if selected else "none"
            axes.plot(layer, cosine, "o", markersize=4, color=f"C{color % 10}", fillstyle=fill)
    if report.record["select"] == "threshold":
        threshold = report.record["threshold"]
        axes.axhline(threshold, color="0.3", linestyle="--", linewidth=1)
        axes.annotate(f"threshold {threshold:g}", (0, threshold), (2, 3), textcoords="offset points", fontsize=8)
    axes.set_xlabel("layer")
    axes.set_ylabel("cos(C B A, B A)")
    axes.set_ylim(0, max(1.0, *(y for points in kinds.values() for _, y, _ in points)) if kinds else 1.0)
    count = f"{len(report.selected)} of {len(report.modules)} modules repaired (filled)"
    axes.set_title(f"Safe LoRA, {report.record['projection']}: {count}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    if kinds:
        axes.legend(fontsize=7, ncols=2, frameon=False)
    return save_figure(canvas, path)


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3g}"
