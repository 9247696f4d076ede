"""Commands that only tell: report, info."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peft_safety.cli.common import JsonOption, app, show


@app.command()
def report(
    path: Annotated[Path, typer.Argument(help="A report.json that protect or the demo wrote.")],
    png: Annotated[Path | None, typer.Option(help="Also draw it here.")] = None,
    card: Annotated[bool, typer.Option("--card", help="Print a Markdown section for a model card instead of a table.")] = False,
) -> None:
    """Print a saved report as a table or a model-card section, or draw it."""
    from peft_safety.report import Report

    loaded = Report.load(path)
    if png is not None:
        loaded.save_png(png)
    typer.echo(loaded.card()) if card else loaded.print()


@app.command()
def info(json: JsonOption = False) -> None:
    """Versions, registered adapter types and devices."""
    import torch

    from peft_safety import registry
    from peft_safety.report import environment

    registry.register()
    facts = environment(seed=0)
    facts.pop("seed")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or ["cpu"]
    show("peft-safety", {**facts, "adapter types": ", ".join(registry.config_types()), "devices": ", ".join(devices)}, json)
