"""The results file: the environment first, then a line a cell."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.frontier.cache import Cache, publish
from benchmarks.frontier.cells import cell_of
from peft_safety.errors import DataError

Row = dict[str, Any]
NAME = "frontier.jsonl"


def stored(cache: Cache) -> list[Row]:
    """All finished cells of a folder that were measured under its protocol, in an order that does not depend on when
    they ran.
    """
    found = []
    for path in sorted(cache.folder.glob("*.json")):
        row = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(row, dict) and "cell" in row and cache.protocol.key(cell_of(row)) == path.stem:
            found.append(row)
    return sorted(found, key=lambda row: json.dumps(row["cell"], sort_keys=True))


def keep(cache: Cache, environment: Mapping[str, Any], out: Path) -> Path:
    """Write `out/frontier.jsonl`.

    Raises:
        ArtifactError: it cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / NAME
    lines = [json.dumps({"environment": dict(environment)}), *(json.dumps(row) for row in stored(cache))]
    publish(path, "\n".join(lines) + "\n")
    return path


def adopt(cache: Cache, path: Path) -> int:
    """Take the cells of a results file as finished, where the cache lacks them; how many were taken.

    Raises:
        DataError: the file was made by another protocol, which it names.
    """
    environment, rows = read(path)
    for name, value in asdict(cache.protocol).items():
        found = environment.get("model" if name == "aligned" else name)
        if found != value:
            raise DataError(
                f"{path} has {name} {found!r}, this call {value!r}: its cells are not these. Give the options that it "
                "was made with."
            )
    missing = [row for row in rows if cache.get(cell_of(row)) is None]
    for row in missing:
        cache.put(cell_of(row), {name: value for name, value in row.items() if name != "cell"})
    return len(missing)


def read(path: Path, benchmark: str = "frontier") -> tuple[dict[str, Any], list[Row]]:
    """Environment and cells of a benchmark.

    Raises:
        DataError: no such file, or not one of this benchmark.
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
