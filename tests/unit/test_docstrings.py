"""The public names say what they take, give and refuse; functions are short, but for signatures and docstrings."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

import peft_safety

PACKAGE = Path(peft_safety.__file__).parent
NAMES = [name for name in peft_safety.__all__ if name != "PeftSafetyError"]
LONGEST_BODY = 50
"""Lines of a function below its docstring."""


def parameters(thing: Any) -> set[str]:
    if isinstance(thing, type) and dataclasses.is_dataclass(thing) and issubclass(thing, LoraConfig):
        inherited = {field.name for field in dataclasses.fields(LoraConfig)}
        own = {field.name for field in dataclasses.fields(thing) if field.init} - inherited
        return own - {"fused", "safety_artifact"}  # those of the base say the same everywhere
    return {name for name in inspect.signature(thing).parameters if name != "self"}


def described(text: str) -> set[str]:
    """The names that have an entry of their own under "Args:", not those that another entry mentions."""
    args = re.split(r"^(?:Attributes|Returns|Raises|Reference)\b", text.partition("Args:")[2], flags=re.MULTILINE)[0]
    entries = re.findall(r"^ {4}(\S[^:\n]*):", args, re.MULTILINE)
    return {word for entry in entries for word in re.findall(r"\w+", entry)}


def test_a_name_is_described_by_an_entry_of_its_own() -> None:
    text = "Do.\n\nArgs:\n    model: with rows of it:\n        text.\n    a, *b: two.\n\nRaises:\n    rows: no.\n"
    assert described(text) == {"model", "a", "b"}


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_says_what_it_takes_gives_and_refuses(name: str) -> None:
    thing = getattr(peft_safety, name)
    text = inspect.getdoc(thing) or ""
    assert parameters(thing) - described(text) == set()
    if inspect.isfunction(thing) and inspect.signature(thing).return_annotation != "None":
        assert "Returns:" in text
    assert "Raises:" in text or name == "explain_dispatch", "and that refuses nothing"


def test_what_a_docstring_raises_exists() -> None:
    from peft_safety import errors

    for name in NAMES:
        said = (inspect.getdoc(getattr(peft_safety, name)) or "").partition("Raises:")[2]
        for error in re.findall(r"\b[A-Z]\w+Error\b", said):
            assert hasattr(errors, error), f"{name}: {error}"


def test_functions_are_short() -> None:
    """A docstring may be long, and so may a signature whose options have help texts; what happens may not."""
    long = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
                if lines > LONGEST_BODY:
                    long[f"{path.relative_to(PACKAGE)}:{node.name}"] = lines
    assert long == {}
