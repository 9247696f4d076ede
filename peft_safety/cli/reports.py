"""Commands that only tell: report, info."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import Annotated

import typer

from peft_safety.cli.common import JsonOption, app, rows, show


@app.command()
def report(
    path: Annotated[Path, typer.Argument(help="A report that protect, patch, the demo or an example wrote.")],
    png: Annotated[Path | None, typer.Option(help="Also draw it here.")] = None,
    card: Annotated[
        bool, typer.Option("--card", help="Print a Markdown section for a model card instead of a table.")
    ] = False,
) -> None:
    """Print a saved report as a table or a model-card section, or draw it."""
    from peft_safety.reporting.report import Report

    loaded = Report.load(path)
    if png is not None:
        loaded.save_png(png)
    typer.echo(loaded.card()) if card else loaded.print()


@app.command()
def info(
    adapter: Annotated[
        Path | None,
        typer.Option(help="Directory of a LoRA adapter: also tell which path each kind of module takes, and why."),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Its base model, if it is not the one that the adapter names.")
    ] = None,
    load_in_4bit: Annotated[bool, typer.Option("--load-in-4bit", help="Load that base model in NF4.")] = False,
    json: JsonOption = False,
) -> None:
    """Versions, registered adapter types and devices; with --adapter, which path its modules take."""
    import torch

    from peft_safety import ops, registry
    from peft_safety.registry import fused
    from peft_safety.reporting.report import environment

    registry.register()
    facts = environment(seed=0)
    facts.pop("seed")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or ["cpu"]
    name, reason = ops.backend_for(torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu"))
    facts |= {
        "adapter types": ", ".join(registry.config_types()),
        "devices": ", ".join(devices),
        "operations": f"{name}: {reason}",
    }
    if adapter is None:
        show("peft-safety", facts, json)
        return
    from peft_safety.recipes.load import load_adapter

    loaded, _ = load_adapter(adapter, model, load_in_4bit=load_in_4bit)
    routes = fused.explain(loaded)
    if json:
        typer.echo(jsonlib.dumps({**facts, "paths": [route._asdict() for route in routes]}, indent=1, default=str))
        return
    show("peft-safety", facts, False)
    rows("which path runs", fused.summary(routes))
