"""Repairs and fusions as tables, and a Safe LoRA repair as a picture (their JSON is `to_json` of the reports)."""

from __future__ import annotations

import math
import re
from pathlib import Path

from peft_safety.audit.report import layer_number
from peft_safety.core.names import kind_of, lines, listed
from peft_safety.methods.guardspace import BlindReport
from peft_safety.methods.safe_lora import RepairReport
from peft_safety.methods.safe_lora.repair import UNCONSTRAINED, ModuleRepair
from peft_safety.methods.somf import FuseReport
from peft_safety.reporting import render, style

NOTE = (
    "cos: between the update and its projection. gain: length left if repaired. |V|/|W|: what alignment changed, "
    "relative to the weight."
)
BLIND_NOTE = (
    "removed: share of the update that acted on the protected inputs. leak: largest share of lora_A left there."
)


def show(report: RepairReport, every_module: bool = False) -> None:
    """Print medians by kind of module and over all, with the smallest cosine; or one row a module."""
    record, cells = report.record, []
    for label, rows in lines(report.modules, lambda row: row.name, every_module):
        least = min((row.cos for row in rows if not math.isnan(row.cos)), default=math.nan)
        cosines = [render.median(row.cos for row in rows), *([] if every_module else [least])]
        others = [render.median(getattr(row, name) for row in rows) for name in ("gain", "kept_norm", "delta")]
        cells.append([label, str(sum(row.selected for row in rows)), *map(render.number, [*cosines, *others])])
    headings = ["module", "repaired", "cos", *([] if every_module else ["(least)"]), "gain", "norm left", "|V|/|W|"]
    counts = f"{record['repaired']} of {record['modules']} modules repaired"
    title = f"Safe LoRA ({record['projection']}, {record['select']}): {counts}{_what(every_module)}"
    others = record.get(UNCONSTRAINED, ())
    notes = [NOTE, *([f"Trained, no factors, and left as they are: {listed(others)}."] if others else [])]
    render.show(title, render.table(headings, cells), notes=notes)


def show_blind(report: BlindReport, every_module: bool = False, dry_run: bool = False) -> None:
    """Print medians by kind of module and over all, with the largest figures; or one row a module."""
    cells = []
    for label, rows in lines(report.modules, lambda row: row.name, every_module):
        shares = [f"{render.median(row.removed for row in rows):.1%}", f"{max(row.removed for row in rows):.1%}"]
        leak = f"{max(row.leak for row in rows):.1e}"
        cells.append([label, render.span(row.k for row in rows), *shares[: 1 if every_module else 2], leak])
    headings = ["module", "k", "removed", *([] if every_module else ["(most)"]), "leak"]
    notes = [BLIND_NOTE]
    if report.unconstrained:
        notes.append(f"{len(report.unconstrained)} trained tensors are no factors, and stay as they are.")
    title = f"GuardSpace: {len(report.modules)} modules {'would be ' * dry_run}made blind{_what(every_module)}"
    render.show(title, render.table(headings, cells), notes=notes)


def _what(every_module: bool) -> str:
    return "" if every_module else " (medians by kind)"


def show_fusion(report: FuseReport, every_mask: bool = False) -> None:
    """Print what is fused, and the masks: medians by kind of mask and over all, or one row a mask."""
    facts, record = report.facts, report.to_json()
    tasks = " + ".join(f"{w:g} {task['name']}" for w, task in zip(facts["weights"], facts["tasks"], strict=True))
    result = f"a LoRA of rank {facts['rank']}" if facts["rank"] else "a checkpoint"
    title = f"{facts['method']}, {facts['layout']}: {facts['safe']['name']} + {tasks} -> {result}"
    if report.mask_shapes:
        size = f"{record['training_bytes'] / 2**20:.1f} MiB with optimizer state"
        title += f"; {facts['granularity']} mask of {record['mask_entries']:,} entries ({size})"
    if "density" in record:
        title += f", density {record['density']:.3f}"
    cells = []
    for label, masks in lines([*record["masks"].items()], lambda item: item[0], every_mask, _kind_of_mask):
        shapes = {" x ".join(map(str, mask["shape"])) for _, mask in masks}
        densities = [mask["density"] for _, mask in masks if mask["density"] is not None]
        shape = shapes.pop() if len(shapes) == 1 else f"{len(shapes)} shapes"
        cells.append([label, shape, render.number(render.median(densities), ".3f")])
    render.show(title, *([render.table(["mask", "shape", "density"], cells)] if record["masks"] else []))


def _kind_of_mask(name: str) -> str:
    """What follows the last number of a mask's name: `self_attn.q_proj.lora_A`."""
    return re.split(r"(?:^|\.)\d+\.", name)[-1]


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
