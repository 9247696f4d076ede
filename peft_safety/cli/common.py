"""What the commands share: the application, options that several have, reading flags, printing facts."""

from __future__ import annotations

import json as jsonlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="LoRA fine-tuning that keeps a model's safety alignment.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ModelOption = Annotated[str, typer.Option("--model", "-m", help="Hub id or directory of the base model.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
TargetsOption = Annotated[
    str, typer.Option(help='"all-linear", names separated by commas, or one regular expression.')
]
RankOption = Annotated[int, typer.Option(help="LoRA rank.")]
SafetyRankOption = Annotated[
    float | None,
    typer.Option(
        help="Protected directions per layer, or below 1 a share of its features; default: the method's own, "
        "0.25 for guardspace, 32 for others."
    ),
]
SafetyEnergyOption = Annotated[
    float | None, typer.Option(help="Instead of --safety-rank: as many directions as hold this share of the energy.")
]
SafetyRankPatternOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Another --safety-rank or --safety-energy for a kind of module: down_proj=0.1; may be repeated."
    ),
]


def fail(error: Exception, code: int) -> Any:
    from rich.console import Console

    Console(stderr=True).print(
        f"[bold red]{type(error).__name__}[/]:", str(error), markup=True, highlight=False, soft_wrap=True
    )
    sys.exit(code)


def targets(text: str) -> str | list[str]:
    """Names separated by commas become a list; everything else is a shorthand, a name or a regular expression."""
    if text == "all-linear" or any(c in text for c in "*+?()[]|\\^$"):
        return text
    return [name.strip() for name in text.split(",") if name.strip()]


def whole(rank: float | None) -> float | None:
    """`--safety-rank`: a number of directions is an integer, a share stays as it is."""
    return rank if rank is None or rank % 1 else int(rank)


def numbers(pairs: list[str]) -> dict[str, float]:
    """`kind=number` options: whole numbers stay integers."""
    from peft_safety.errors import ConfigError

    found: dict[str, float] = {}
    for pair in pairs:
        kind, _, text = pair.partition("=")
        try:
            found[kind.strip()] = float(text) if "." in text else int(text)
        except ValueError as error:
            raise ConfigError(
                f"--safety-rank-pattern {pair!r}. Write a kind of module and a number: down_proj=0.1."
            ) from error
    return found


def calibration_sets(named: str, general: Path | None, harmful: Path | None) -> Any:
    """What `--calibration`, `--general` and `--harmful` ask for."""
    from peft_safety.data import read_jsonl
    from peft_safety.errors import ConfigError

    if named not in ("none", "auto"):
        raise ConfigError(f"--calibration {named!r}. Use none or auto, or give --general and --harmful.")
    if general is None and harmful is None:
        return None if named == "none" else "auto"
    if general is None or harmful is None or named == "auto":
        raise ConfigError(
            "own calibration data are two files. Give both --general and --harmful, without --calibration auto."
        )
    return {"general": read_jsonl(general), "harmful": read_jsonl(harmful)}


def show(title: str, facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(jsonlib.dumps(facts, indent=1, default=str))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, show_header=False, title_justify="left")
    for key, value in facts.items():
        shown = (
            f"{value:.3g}"
            if isinstance(value, float)
            else ", ".join(map(str, value))
            if isinstance(value, (tuple, list))
            else str(value)
        )
        table.add_row(str(key).replace("_", " "), shown)
    Console().print(table)


def rows(title: str, found: list[dict[str, Any]]) -> None:
    """A table of rows with equal keys."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for key in found[0] if found else ():
        table.add_column(key.replace("_", " "))
    for row in found:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(table)
