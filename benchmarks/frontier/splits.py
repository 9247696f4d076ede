"""Settings are chosen on validation prompts and written down. On test prompts only these and the documented defaults
run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.common import publish
from benchmarks.frontier.cache import Cache
from benchmarks.frontier.cells import Cell, cell_of
from benchmarks.frontier.plan import METHODS, difference, name_of
from benchmarks.frontier.results import Row
from peft_safety.errors import ConfigError, DataError

FILE = "chosen.json"


def score(rows: Sequence[Row]) -> float:
    """What a setting is chosen by: the mean of refusal + accuracy - over-refusal over its cells."""
    return sum(
        row["refusal"]["value"] + row["task_accuracy"]["value"] - row["over_refusal"]["value"] for row in rows
    ) / len(rows)


def default_name(cell: Cell) -> str:
    """The documented method that a cell is a setting of."""
    return name_of(cell).split(" with ")[0]


def choose(rows: Sequence[Row], family: Callable[[Cell], str] = default_name) -> dict[str, tuple[Cell, list[Cell]]]:
    """The best setting of every family that has several settings on validation prompts, and the cells that it was
    chosen by.

    A setting that diverged anywhere is out. Only settings that were measured at the most places are compared.

    Args:
        family: settings of one family compete with each other; default: settings of one documented method.
    """
    families: dict[str, dict[Cell, list[Row]]] = {}
    for row in rows:
        cell = cell_of(row)
        if cell.split == "validation" and cell.arm != "aligned" and not cell.control:
            families.setdefault(family(cell), {}).setdefault(cell.method, []).append(row)
    chosen = {}
    for name, settings in families.items():
        finite = {method: group for method, group in settings.items() if not any("diverged" in row for row in group)}
        most = max((len(group) for group in finite.values()), default=0)
        complete = {method: group for method, group in finite.items() if len(group) == most}
        if len(complete) > 1:
            best = max(complete, key=lambda method: score(complete[method]))
            chosen[name] = (best, [cell_of(row) for row in complete[best]])
    return chosen


def write(cache: Cache, chosen: Mapping[str, tuple[Cell, Sequence[Cell]]], file: str = FILE) -> Path:
    """Write a choice next to the cells that it was made from.

    Raises:
        DataError: nothing was chosen. ConfigError: the file exists, and test prompts may have been looked at since.
    """
    path = cache.folder / file
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


def read(cache: Cache, file: str = FILE) -> dict[str, Cell]:
    """The chosen settings by family; none while there is no file. The validation cells behind each must be in this
    folder.

    Raises:
        DataError: the file is malformed, or names cells that are missing, of the test split, or of another setting.
    """
    path = cache.folder / file
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
