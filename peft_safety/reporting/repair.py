"""Repairs and fusions as tables, and a Safe LoRA repair as a picture (their JSON is `to_json` of the reports)."""

from __future__ import annotations

import math
from pathlib import Path

from peft_safety.audit.report import layer_number
from peft_safety.calibration.sizes import kind_of
from peft_safety.methods.guardspace import BlindReport
from peft_safety.methods.safe_lora import RepairReport
from peft_safety.methods.safe_lora.repair import ModuleRepair
from peft_safety.methods.somf import FuseReport
from peft_safety.reporting import render, style

NOTE = (
    "cos: between the update and its projection. gain: length left if repaired. |V|/|W|: what alignment changed, "
    "relative to the weight."
)


def show(report: RepairReport) -> None:
    record = report.record
    rows = [
        [row.name, render.number(row.cos), "yes" if row.selected else ""]
        + [render.number(value) for value in (row.gain, row.kept_norm, row.delta)]
        for row in report.modules
    ]
    table = render.table(["module", "cos", "repaired", "gain", "norm left", "|V|/|W|"], rows)
    counts = f"{record['repaired']} of {record['modules']} modules repaired"
    render.show(f"Safe LoRA ({record['projection']}, {record['select']}): {counts}", table, notes=[NOTE])


def show_blind(report: BlindReport) -> None:
    rows = [[row.name, str(row.k), f"{row.removed:.1%}", f"{row.leak:.1e}"] for row in report.modules]
    table = render.table(["module", "k", "removed", "leak"], rows)
    notes = ["removed: share of the update that acted on the protected inputs. leak: share of lora_A left there."]
    if report.unconstrained:
        notes.append(f"{len(report.unconstrained)} trained tensors are no factors, and stay as they are.")
    render.show(f"GuardSpace: {len(rows)} modules made blind", table, notes=notes)


def show_fusion(report: FuseReport) -> None:
    facts, record = report.facts, report.to_json()
    tasks = " + ".join(f"{w:g} {task['name']}" for w, task in zip(facts["weights"], facts["tasks"], strict=True))
    result = f"a LoRA of rank {facts['rank']}" if facts["rank"] else "a checkpoint"
    title = f"{facts['method']}, {facts['layout']}: {facts['safe']['name']} + {tasks} -> {result}"
    if report.mask_shapes:
        size = f"{record['training_bytes'] / 2**20:.1f} MiB with optimizer state"
        title += f"; {facts['granularity']} mask of {record['mask_entries']:,} entries ({size})"
    if "density" in record:
        title += f", density {record['density']:.3f}"
    rows = [
        [name, " x ".join(map(str, mask["shape"])), render.number(mask["density"], ".3f")]
        for name, mask in record["masks"].items()
    ]
    render.show(title, *([render.table(["mask", "shape", "density"], rows)] if rows else []))


def save_png(report: RepairReport, path: str | Path) -> Path:
    """The cosine of each module, by kind and in the order of the layers; repaired ones are filled."""
    kinds: dict[str, list[ModuleRepair]] = {}
    for row in sorted(report.modules, key=lambda row: layer_number(row.name) or 0):
        if not math.isnan(row.cos):
            kinds.setdefault(kind_of(row.name), []).append(row)
    count = f"{len(report.selected)} of {len(report.modules)} modules repaired (filled)"
    title = f"Safe LoRA, {report.record['projection']}: {count}"
    with style.picture(path, 2.9, title=title) as (_, (axes,)):
        for place, rows in enumerate(kinds.values()):
            across = [place + 0.7 * (index / max(1, len(rows) - 1) - 0.5) for index in range(len(rows))]
            axes.plot(across, [row.cos for row in rows], color=style.GRID, lw=1)
            for x, row in zip(across, rows, strict=True):
                style.point(axes, x, row.cos, style.color_of("safe_lora"), hollow=not row.selected)
        if report.record["select"] == "threshold":
            threshold = report.record["threshold"]
            axes.axhline(threshold, color=style.MUTED, linestyle="--", lw=1)
            where = {"transform": axes.get_yaxis_transform(), "va": "center"}
            axes.text(1.02, threshold, f"threshold\n{threshold:g}", color=style.MUTED, **where)
        axes.set_xticks(range(len(kinds)), list(kinds))
        axes.set_xlabel("modules by kind, each from the first layer to the last")
        axes.set_ylabel("cos(C B A, B A)")
        axes.set_ylim(0, max([1.0, *(row.cos for rows in kinds.values() for row in rows)]))
        axes.grid(axis="y")
    return Path(path)
