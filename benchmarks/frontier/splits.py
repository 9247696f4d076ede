"""Test prompts are looked at with settings that were fixed before: the documented defaults, or what was chosen on
validation prompts and written down.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.frontier.cache import Cache, publish
from benchmarks.frontier.cells import Cell, cell_of
from benchmarks.frontier.plan import METHODS, difference, name_of
from peft_safety.errors import ConfigError, DataError

Row = dict[str, Any]
FILE = "chosen.json"


def score(rows: Sequence[Row]) -> float:
    """What a setting is chosen by: refusal + accuracy - over-refusal, the mean over its cells."""
    return sum(
        row["refusal"]["value"] + row["task_accuracy"]["value"] - row["over_refusal"]["value"] for row in rows
    ) / len(rows)


def choose(rows: Sequence[Row]) -> dict[str, tuple[Cell, list[Cell]]]:
    """For every method with more than one setting on validation prompts, the best of those measured at equally many
    places, and the cells behind it.

    A setting that diverged anywhere is out.
    """
    found: dict[tuple[str, str, str], dict[Cell, list[Row]]] = {}
    for row in rows:
        cell = cell_of(row)
        if cell.split == "validation" and cell.arm != "aligned" and not cell.control:
            found.setdefault(family(cell), {}).setdefault(cell.method, []).append(row)
    chosen = {}
    for settings in found.values():
        whole = {method: group for method, group in settings.items() if not any("diverged" in row for row in group)}
        most = max((len(group) for group in whole.values()), default=0)
        full = {method: group for method, group in whole.items() if len(group) == most}
        if len(full) > 1:
            best = max(full, key=lambda method: score(full[method]))
            chosen[default_name(best)] = (best, [cell_of(row) for row in full[best]])
    return chosen


def default_name(method: Cell) -> str:
    """The documented method that a setting is one of."""
    return name_of(method).split(" with ")[0]


def family(cell: Cell) -> tuple[str, str, str]:
    """Settings of one family compete with each other."""
    return default_name(cell), cell.control, cell.load


def write(cache: Cache, rows: Sequence[Row]) -> Path:
    """Write the choice down beside the cells it was made from.

    Raises:
        DataError: there is nothing to choose from. ConfigError: it has been written before, and test prompts may have
            been looked at since.
    """
    path, chosen = cache.folder / FILE, choose(rows)
    if not chosen:
        raise DataError(
            "no method has two settings on validation prompts to choose from. Run some with --split validation --set "
            "METHOD:NAME=VALUE first."
        )
    if path.is_file():
        raise ConfigError(
            f"{path} is there already: a setting is chosen once, before test prompts are looked at. Start another "
            "folder to choose anew."
        )
    facts = {
        name: {
            "setting": difference(METHODS[name], method),
            "method": vars(method),
            "cells": sorted(cache.protocol.key(cell) for cell in cells),
        }
        for name, (method, cells) in chosen.items()
    }
    publish(path, json.dumps(facts, indent=2) + "\n")
    return path


def read(cache: Cache) -> dict[str, Cell]:
    """The chosen methods by the name of the one they are a setting of; each must still rest on validation cells in
    this folder.

    Raises:
        DataError: the file is malformed, or names cells that are not there, of the test split, or of another setting.
    """
    path = cache.folder / FILE
    if not path.is_file():
        return {}
    chosen = {}
    try:
        for name, facts in json.loads(path.read_text(encoding="utf-8")).items():
            method = Cell(**facts["method"])
            behind = [
                cell_of(json.loads((cache.folder / f"{Path(key).name}.json").read_text(encoding="utf-8")))
                for key in facts["cells"]
            ]
            if not behind or any(cell.split != "validation" or cell.method != method.method for cell in behind):
                raise DataError(
                    f"{path}: the choice for {name} does not rest on validation cells of that setting. Choose anew "
                    "with --choose, in another folder."
                )
            chosen[name] = method
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{path} is not what --choose writes ({type(error).__name__}: {error}). Choose anew, in another folder."
        ) from error
    return chosen


def enforce(cells: Sequence[Cell], chosen: Mapping[str, Cell]) -> None:
    """Refuse a setting on test prompts that is neither a documented default nor chosen on validation prompts.

    Raises:
        ConfigError: it names the cell and the way out.
    """
    allowed = {method.method for method in (*METHODS.values(), *controls(chosen))}
    for cell in cells:
        if cell.split == "test" and cell.method not in allowed:
            raise ConfigError(
                f"{name_of(cell)} on test prompts: a setting is chosen on validation prompts and then written down "
                "(--choose), never tried on test prompts. "
                "Use --split validation, or the default."
            )


def controls(chosen: Mapping[str, Cell]) -> list[Cell]:
    """The chosen settings with their controls."""
    return [replace(method, control=control) for method in chosen.values() for control in ("", "random", "scaled")]
