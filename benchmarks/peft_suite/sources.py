"""A copy of PEFT's tests in which `LoraConfig` is the class of the arm that runs."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

PACKAGE = "tests"
"""The name of the copy, by which some of PEFT's test modules import their neighbors."""
NAME = "LoraConfig"
STAND_IN = f"from benchmarks.peft_suite.arms import {NAME}"


def substituted(source: str) -> str:
    """The source with the stand-in imported after each import of `LoraConfig` from PEFT, on the same line: line
    numbers stay PEFT's.
    """
    lines = source.encode().split(b"\n")  # the columns of `ast` count bytes
    ends = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "peft" and not node.level:
            ends += [(node.end_lineno, node.end_col_offset, alias) for alias in node.names if alias.name == NAME]
    for row, column, alias in ends:
        assert row is not None
        assert column is not None
        text, more = lines[row - 1], f"; {STAND_IN}" + (f" as {alias.asname}" if alias.asname else "")
        lines[row - 1] = text[:column] + more.encode() + text[column:]
    return b"\n".join(lines).decode()


def copy_tests(tests: Path, folder: Path) -> Path:
    """Write the substituted copy into a folder, in place of an older one; returns where it lies."""
    target = folder / PACKAGE
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    (target / "__init__.py").touch()
    for path in sorted(tests.glob("*.py")):
        if path.name != "__init__.py":
            (target / path.name).write_text(substituted(path.read_text(encoding="utf-8")), encoding="utf-8")
    return target
