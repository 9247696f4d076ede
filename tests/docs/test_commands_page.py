"""docs/commands.md has every command, and the options that they really have."""

from __future__ import annotations

import re

import typer.main

from peft_safety.cli import app
from tests.docs.commands_page import PAGE, page


def test_the_tables_of_options_are_those_of_the_commands() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "python -m tests.docs.commands_page"


def test_every_command_has_a_line_in_the_first_table() -> None:
    first = PAGE.read_text(encoding="utf-8").partition("\n## ")[0]
    listed = {*re.findall(r"^\| `([a-z]+)", first, re.MULTILINE)}
    assert listed == {*typer.main.get_command(app).commands}  # type: ignore[attr-defined]
