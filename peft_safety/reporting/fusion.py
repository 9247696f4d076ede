"""A planned or finished fusion as a table (its JSON is `FuseReport.to_json`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft_safety.methods.somf import FuseReport

if TYPE_CHECKING:
    from rich.table import Table


def table(report: FuseReport) -> Table:
    """One row per mask."""
    from rich.table import Table

    facts, record = report.facts, report.to_json()
    tasks = " + ".join(f"{w:g} {task['name']}" for w, task in zip(facts["weights"], facts["tasks"], strict=True))
    result = f"a LoRA of rank {facts['rank']}" if facts["rank"] else "a checkpoint"
    title = f"{facts['method']}, {facts['layout']}: {facts['safe']['name']} + {tasks} -> {result}"
    if report.mask_shapes:
        size = f"{report.training_bytes / 2**20:.1f} MiB with optimizer state"
        title += f"; {facts['granularity']} mask of {report.mask_entries:,} entries ({size})"
    if "density" in record:
        title += f", density {record['density']:.3f}"
    shown = Table("mask", title=title, title_justify="left")
    for heading in ("shape", "density"):
        shown.add_column(heading, justify="right")
    for name, mask in record["masks"].items():
        density = "-" if mask["density"] is None else f"{mask['density']:.3f}"
        shown.add_row(name, " x ".join(map(str, mask["shape"])), density)
    return shown
