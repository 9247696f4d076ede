"""The options in docs/commands.md, made of the commands themselves: `python -m tests.docs.commands_page`."""

from __future__ import annotations

import textwrap
from dataclasses import fields
from typing import Any, get_type_hints

import typer.main

from peft_safety.cli import app
from peft_safety.recipes.job.options import SafetyOptions
from tests.docs.pages import DOCS

PAGE = DOCS / "commands.md"
BEGIN, END = "<!-- options:begin -->\n", "<!-- options:end -->\n"
VALUES = {"Path": "PATH", "str": "TEXT", "int": "N", "float": "X"}
"""What stands for a value, by its type."""
HEAD = ["", "| option | default | meaning |", "| --- | --- | --- |"]


def section() -> str:
    """A part for each command: what it does, and a table of its arguments and options."""
    lines: list[str] = []
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        lines += [f"### {name}", "", *textwrap.wrap(command.help, 119), *HEAD]
        lines += _of_train() if name == "train" else _rows(command)
        lines += [""]
    return "\n".join(lines)


def _rows(command: Any) -> list[str]:
    hints = get_type_hints(command.callback)
    rows = []
    for parameter in command.params:
        names = [*parameter.opts, *parameter.secondary_opts]
        if parameter.param_type_name == "argument":
            names = [parameter.name.upper()]
        elif not parameter.is_flag:
            names[0] += f" {next(value for kind, value in VALUES.items() if kind in str(hints[parameter.name]))}"
        default = "needed" if parameter.required else _shown(parameter.default)
        rows.append(_cells(", ".join(f"`{name}`" for name in names), default, parameter.help))
    return rows


def _of_train() -> list[str]:
    rows = [
        ("`--config PATH`", "-", "YAML file of settings; flags override it. All of TRL's settings are flags, too.")
    ]
    for field in fields(SafetyOptions):
        name = f"`--{field.name}`" if isinstance(field.default, bool) else f"`--{field.name} VALUE`"
        rows.append((name, _shown(field.default), field.metadata["help"]))
    return [_cells(*row) for row in rows]


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    return "-" if default in (None, "") else str(default)


def _cells(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def page() -> str:
    """The page as it is, with these parts."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    return f"{before}{BEGIN}\n{section()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
