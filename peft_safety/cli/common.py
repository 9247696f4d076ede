"""What the commands share: the application, and printing results and errors."""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sized
from typing import Any

import typer

from peft_safety.reporting import render

app = typer.Typer(
    help="LoRA fine-tuning that keeps a model's safety alignment.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

SHA256 = re.compile("[0-9a-f]{64}")


def fail(error: Exception, code: int) -> Any:
    """Print an error as one line on stderr, and exit."""
    from rich.text import Text

    message = Text.assemble((f"{type(error).__name__}:", "bold red"), f" {render.printable(str(error))}")
    render.plain_console(stderr=True).print(message, soft_wrap=True)
    sys.exit(code)


def show(facts: Mapping[str, Any], as_json: bool, *parts: str | Callable[[], object]) -> None:
    """Print the result of a command: as JSON; or its parts, which are lines of text and functions that print."""
    if as_json:
        typer.echo(json.dumps(facts, indent=1, default=str))
        return
    for part in parts:
        typer.echo(render.printable(part)) if isinstance(part, str) else part()


def print_facts(title: str, facts: Mapping[str, Any]) -> None:
    """Print a table of facts. Those without a value are left out, and hashes are shortened as in errors."""
    rows = [[name.replace("_", " "), _text(name, value)] for name, value in facts.items() if _has_value(value)]
    render.show(title, render.table(["", ""], rows, prose=[1]))


def _has_value(value: Any) -> bool:
    return value is not None and not (isinstance(value, Sized) and len(value) == 0)


def _text(name: str, value: Any) -> str:
    if name == "covered" and value:
        return f"median {statistics.median(value.values()):.3g}, least {min(value.values()):.3g}"
    if isinstance(value, Mapping):
        return "; ".join(f"{key}: {_text(key, item)}" for key, item in value.items() if _has_value(item))
    if isinstance(value, (tuple, list)):
        return ", ".join(_text("", item) for item in value)
    if isinstance(value, str) and SHA256.fullmatch(value):
        return value[:12]
    return f"{value:.3g}" if isinstance(value, float) else str(value)
