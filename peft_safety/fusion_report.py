"""A fusion as tables: what it will do, and what it did (their JSON is `FusePlan.to_json` and `FuseReport.to_json`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft_safety.methods.somf import FusePlan, FuseReport

if TYPE_CHECKING:
    from rich.table import Table


def plan_table(plan: FusePlan) -> Table:
    """One row a module."""
    from rich.table import Table

    mask = (
        f", a mask of {plan.logits:,} logits ({plan.granularity}; {plan.training_bytes / 2**20:.1f} MiB with "
        "optimizer state)"
        if plan.granularity
        else ""
    )
    weights = ", ".join(f"{w:g}" for w in plan.weights)
    shown = Table(
        title=f"{plan.method}: {plan.safe} + {plan.fusion}({', '.join(plan.tasks)}), {plan.layout}, weights "
        f"{weights}{mask} -> {plan.result}",
        title_justify="left",
    )
    for heading in ("module", "weight", "ranks", "rank after", "logits"):
        shown.add_column(heading, justify="left" if heading == "module" else "right", overflow="fold")
    for row in plan.modules:
        shape, ranks = " x ".join(map(str, row.shape)), ", ".join(map(str, row.ranks)) or "-"
        shown.add_row(row.name, shape, ranks, str(row.rank or "full"), f"{row.logits:,}" if row.logits else "-")
    return shown


def table(report: FuseReport) -> Table:
    """One row a module."""
    from rich.table import Table

    density = report.record.get("density")
    shown = Table(
        title=f"{report.plan.method}: {len(report.modules)} modules fused from {len(report.plan.tasks)} tasks"
        + ("" if density is None else f", density {density:.3f}"),
        caption="density: share of the mask that is kept. kept: length of the tasks' part, relative to no mask. "
        "error: of the recompression, relative.",
        title_justify="left",
        caption_justify="left",
    )
    for heading in ("module", "rank", "density", "kept", "error"):
        shown.add_column(heading, justify="left" if heading == "module" else "right", overflow="fold")
    for row in report.modules:
        shown.add_row(
            row.name,
            str(row.rank or "full"),
            *("-" if v is None else f"{v:.3g}" for v in (row.density, row.kept, row.error)),
        )
    return shown
