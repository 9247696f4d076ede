"""Results files: first the environment, then one line for each cell."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.frontier.cache import Cache
from benchmarks.frontier.cells import cell_of
from peft_safety.errors import DataError

Row = dict[str, Any]
BENCHMARK = "frontier"
NAME = f"{BENCHMARK}.jsonl"
OTHERS = ("news", "banking", "instructions")
"""Tasks with a results file of their own."""
FIRST_PATCH = (
    "Measured on a model that the first patch recipe aligned: it also refuses 28 % of a foreign set of everyday "
    "instructions (3 % without the patch), "
    "and the keyword judge still took polite apologies for refusals. To be run anew on today's patch."
)


def results_of(task: str) -> str:
    """The name of the results file of a task, without `.jsonl`."""
    return f"{BENCHMARK}_{task}" if task in OTHERS else BENCHMARK


def stored(cache: Cache) -> list[Row]:
    """All finished cells of a folder that were measured under its protocol, in an order that does not depend on when
    they ran.
    """
    rows = []
    for path in sorted(cache.folder.glob("*.json")):
        row = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(row, dict) and "cell" in row and cache.protocol.key(cell_of(row)) == path.stem:
            rows.append(row)
    return sorted(rows, key=lambda row: json.dumps(row["cell"], sort_keys=True))


def adopt(cache: Cache, path: Path) -> int:
    """Copy the cells of a results file into a cache that lacks them; returns how many were copied.

    Raises:
        DataError: the file was made under another protocol.
    """
    environment, rows = read(path)
    for name, value in asdict(cache.protocol).items():
        recorded = environment.get("model" if name == "aligned" else name)
        if recorded != value:
            raise DataError(
                f"{path} has {name} {recorded!r}, this call {value!r}: its cells are not these. Give the options that "
                "it was made with."
            )
    missing = [row for row in rows if cache.get(cell_of(row)) is None]
    for row in missing:
        cache.put(cell_of(row), {name: value for name, value in row.items() if name != "cell"})
    return len(missing)


def read(path: Path, benchmark: str = BENCHMARK) -> tuple[dict[str, Any], list[Row]]:
    """Environment and cells of a results file.

    Raises:
        DataError: there is no such file, or it is not one of this benchmark.
    """
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        environment, rows = lines[0]["environment"], lines[1:]
        for row in rows:
            cell_of(row)
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise DataError(
            f"{path} holds no results ({type(error).__name__}: {error}). Run python -m benchmarks.{benchmark}."
        ) from error
    return environment, rows


def facts(environment: Mapping[str, Any], hidden: Sequence[str] = ("sets",)) -> str:
    """The environment as one line of a report; empty values are left out."""
    shown = {name: value for name, value in environment.items() if name not in hidden and value not in ("", {})}
    return ", ".join(f"{name} {value}" for name, value in shown.items())


def caveats(environment: Mapping[str, Any]) -> list[str]:
    """What a reader of older results has to know."""
    return (
        [FIRST_PATCH] if str(environment.get("model", "")).endswith("patched") and not environment.get("patch") else []
    )
