"""Commands that only report: report, info."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Context, Option

from peft_safety.cli import options as opt
from peft_safety.cli.common import app, print_facts, show
from peft_safety.reporting import render


@app.command()
def report(
    path: Annotated[Path, Argument(help="A report that train, patch, the demo or an example wrote.")],
    png: Annotated[Path | None, Option(help="Also draw it here.")] = None,
    card: Annotated[bool, Option("--card", help="Print a Markdown section for a model card instead.")] = False,
) -> None:
    """Print a saved report as a table or a model-card section, or draw it."""
    from peft_safety.reporting import style
    from peft_safety.reporting.report import Report

    loaded = Report.load(path)
    if png is not None:
        style.check_png(png)
    typer.echo(render.printable(loaded.card())) if card else loaded.print()
    if png is not None:
        loaded.save_png(png)


@app.command()
def info(
    context: Context,
    adapter: Annotated[Path | None, Option(help="A LoRA adapter: show which path its modules take, and why.")] = None,
    model: opt.AdapterModel = None,
    load_in_4bit: Annotated[bool, Option("--load-in-4bit", help="Load that base model in NF4.")] = False,
    json: opt.Json = False,
) -> None:
    """Versions, registered adapter types and devices; with --adapter, which path its modules take."""
    if adapter is None:
        opt.refuse(context, ("model", "load_in_4bit"), "without --adapter")
    import torch

    from peft_safety import ops, registry
    from peft_safety.core.environment import environment
    from peft_safety.registry import fused

    registry.register()
    facts = environment(seed=0)
    del facts["seed"]
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or ["cpu"]
    name, reason = ops.backend_for(torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu"))
    facts |= {"adapter types": ", ".join(registry.config_types()), "devices": ", ".join(devices)}
    facts["operations"] = f"{name}: {reason}"
    if adapter is None:
        show(facts, json, lambda: print_facts("peft-safety", facts))
        return
    from peft_safety.recipes.load import load_adapter

    loaded, _ = load_adapter(adapter, model, load_in_4bit=load_in_4bit)
    routes = fused.explain_dispatch(loaded)

    def print_tables() -> None:
        print_facts("peft-safety", facts)
        rows = [[str(value) for value in row.values()] for row in fused.summary(routes)]
        render.show("which path runs", render.table(["kind", "path", "reason", "modules"], rows, prose=[1, 2]))

    show(facts | {"paths": [route._asdict() for route in routes]}, json, print_tables)
