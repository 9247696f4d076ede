"""A planned or finished fusion as a table (its JSON is `FuseReport.to_json`)."""

from __future__ import annotations

from peft_safety.methods.somf import FuseReport
from peft_safety.reporting import render


def show(report: FuseReport) -> None:
    """Print what is fused, and one row per mask."""
    facts, record = report.facts, report.to_json()
    tasks = " + ".join(f"{w:g} {task['name']}" for w, task in zip(facts["weights"], facts["tasks"], strict=True))
    result = f"a LoRA of rank {facts['rank']}" if facts["rank"] else "a checkpoint"
    title = f"{facts['method']}, {facts['layout']}: {facts['safe']['name']} + {tasks} -> {result}"
    if report.mask_shapes:
        size = f"{report.training_bytes / 2**20:.1f} MiB with optimizer state"
        title += f"; {facts['granularity']} mask of {report.mask_entries:,} entries ({size})"
    if "density" in record:
        title += f", density {record['density']:.3f}"
    rows = [
        [name, " x ".join(map(str, mask["shape"])), render.number(mask["density"], ".3f")]
        for name, mask in record["masks"].items()
    ]
    render.show(title, *([render.table(["mask", "shape", "density"], rows)] if rows else []))
