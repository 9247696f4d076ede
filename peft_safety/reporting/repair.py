"""Repairs and fusions as tables, and a Safe LoRA repair as a picture (their JSON is `to_json` of the reports)."""

from __future__ import annotations

import math
from pathlib import Path

from peft_safety.audit.report import layer_number
from peft_safety.calibration.sizes import kind_of
from peft_safety.methods.guardspace import BlindReport
from peft_safety.methods.safe_lora import RepairReport
from peft_safety.methods.somf import FuseReport
from peft_safety.reporting import render

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
    """Cosine by layer, one line per kind of module; repaired modules are filled; with the threshold, if any."""
    canvas, (axes,) = render.figure(8, 4.2)
    kinds: dict[str, list[tuple[int, float, bool]]] = {}
    for index, row in enumerate(report.modules):
        if not math.isnan(row.cos):
            layer = layer_number(row.name)
            point = (index if layer is None else layer, row.cos, row.selected)
            kinds.setdefault(kind_of(row.name), []).append(point)
    for color, (kind, points) in enumerate(sorted(kinds.items())):
        layers, cosines, repaired = zip(*sorted(points), strict=True)
        line = f"C{color % 10}"
        axes.plot(layers, cosines, linewidth=1, color=line, label=kind)
        axes.scatter(layers, cosines, 16, edgecolors=line, facecolors=[line if one else "none" for one in repaired])
    if report.record["select"] == "threshold":
        threshold = report.record["threshold"]
        axes.axhline(threshold, color="0.3", linestyle="--", linewidth=1)
        axes.annotate(f"threshold {threshold:g}", (0, threshold), (2, 3), textcoords="offset points", fontsize=8)
    axes.set_xlabel("layer")
    axes.set_ylabel("cos(C B A, B A)")
    axes.set_ylim(0, max([1.0, *(cosine for points in kinds.values() for _, cosine, _ in points)]))
    count = f"{len(report.selected)} of {len(report.modules)} modules repaired (filled)"
    axes.set_title(f"Safe LoRA, {report.record['projection']}: {count}", fontsize=10)
    if kinds:
        axes.legend(fontsize=7, ncols=2, frameon=False)
    return render.save_figure(canvas, path)
