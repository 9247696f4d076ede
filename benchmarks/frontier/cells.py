"""What a cell is, what all cells share, and the name of a cell's file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from peft_safety.errors import ConfigError

SECOND = 48
"""Rows of the untrained task that both benchmarks measure."""


@dataclass(frozen=True)
class Cell:
    """One fine-tune and its measurement.

    A field added later needs a default that means "as before": fields at their defaults do not enter a cell's name, so
    finished cells keep theirs.

    Attributes:
        arm: a key of `arms.ARMS`.
        poison: share of the training rows that are a simulated attack.
        basis, fraction, positions, calibration: what GuardSpace's null space is made of; empty for arms without one.
        epochs, lr, seed: of the fine-tune.
        split: prompts measured on.
        knobs: settings of the other methods, `name=value` separated by commas.
        control: "" the method itself, "random" its basis replaced by a random one of equal size, "scaled" plain LoRA
            at the norm the method kept.
        load: "" fp32, "nf4" a 4-bit base.
    """

    arm: str = "guard"
    poison: float = 0.1
    basis: str = "harmful"
    fraction: float = 1 / 4
    positions: str = "all"
    calibration: int = 64
    epochs: int = 1
    lr: float = 1e-3
    seed: int = 0
    split: str = "validation"
    knobs: str = ""
    control: str = ""
    load: str = ""

    def without_basis(self, arm: str) -> Cell:
        """The arm "lora" or "aligned" beside this cell."""
        plain = replace(self, arm=arm, basis="", fraction=0.0, positions="", calibration=0, knobs="", control="")
        return replace(plain, poison=0.0, epochs=0, lr=0.0, seed=0) if arm == "aligned" else plain

    @property
    def setting(self) -> tuple[str, float, str]:
        """What the GuardSpace benchmark chooses on validation prompts."""
        return self.basis, self.fraction, self.positions

    @property
    def method(self) -> Cell:
        """The same without its place: equal for all cells of one row of the table."""
        return replace(self, poison=0.0, seed=0, split="")

    def options(self) -> dict[str, Any]:
        """The knobs as values: numbers where they read as numbers.

        Raises:
            ConfigError: a knob without `=`.
        """
        found: dict[str, Any] = {}
        for part in filter(None, self.knobs.split(",")):
            name, equals, text = part.partition("=")
            if not equals or not name:
                raise ConfigError(
                    f"knob {part!r} of arm {self.arm!r} has no value. Write name=value, separated by commas."
                )
            found[name] = _value(text)
        return found

    def label(self) -> str:
        """A few words for a progress bar."""
        parts = [
            self.control,
            self.arm,
            self.basis,
            self.knobs,
            self.load,
            f"p={self.poison:g}",
            f"x{self.epochs}",
            f"seed {self.seed}",
            self.split,
        ]
        return " ".join(part for part in parts if part)


def needs(cell: Cell) -> list[Cell]:
    """Cells whose results a cell reads: "scaled" the one whose norm it takes."""
    return [replace(cell, control="")] if cell.control == "scaled" else []


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


PATCH = "2"
"""The recipe of `peft_safety.recipes.patch` that aligns the model today."""
FIRST_PATCH = (
    "Measured on a model that the first patch recipe aligned: it also refuses 28 % of a foreign set of everyday "
    "instructions (3 % without the patch), "
    "and the keyword judge still took polite apologies for refusals. To be run anew on today's patch."
)


def caveats(environment: Mapping[str, Any]) -> list[str]:
    """What a reader of older results has to know."""
    return (
        [FIRST_PATCH] if str(environment.get("model", "")).endswith("patched") and not environment.get("patch") else []
    )


@dataclass(frozen=True)
class Protocol:
    """What all cells share, and what their cache is valid for. New fields as in `Cell`.

    Attributes:
        rows: of the task, to train on.
        limit: prompts and task rows of each kind at most.
        aligned: name of the aligned model.
        r, max_length: of the fine-tune.
        sets: further prompt sets by name, with a hash of their prompts; measured on test cells only.
        second: rows of a second, untrained task, the same; 0 leaves it out.
        task: hash of the rows of another task than the package's; empty for that.
        judges: names of judges beside the keyword matcher.
        tokens: generated of a response that is judged.
        patch: which recipe aligned the model; empty for the first one, and for a model that was given.
    """

    rows: int = 160
    limit: int = 72
    aligned: str = "SmolLM2-135M-Instruct, patched"
    r: int = 8
    max_length: int = 128
    sets: dict[str, str] = field(default_factory=dict)
    second: int = 0
    task: str = ""
    judges: str = ""
    tokens: int = 16
    patch: str = ""

    def key(self, cell: Cell) -> str:
        """Name of a cell's file. Settings are chosen by the package's own prompts, so validation cells have no further
        sets and do not depend on them.
        """
        shared = self if cell.split == "test" else replace(self, sets={}, second=0)
        return _digest(_set(cell), _set(shared))

    def adapter_key(self, cell: Cell) -> str:
        """Name of what a cell trains, which does not depend on what it is measured on (except that long fine-tunes are
        measured along the way).
        """
        place = cell if cell.epochs > 1 else replace(cell, split="")
        return _digest(
            _set(place), {name: getattr(self, name) for name in ("rows", "aligned", "r", "max_length", "task")}
        )


def _set(record: Any) -> dict[str, Any]:
    """The fields that differ from their defaults: a field added later leaves the names of finished cells as they
    are.
    """
    defaults = type(record)()
    return {name: value for name, value in asdict(record).items() if value != getattr(defaults, name)}


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def cell_of(row: dict[str, Any]) -> Cell:
    """The cell of a stored result.

    Raises:
        ConfigError: fields that this version does not know.
    """
    known = {f.name for f in fields(Cell)}
    odd = sorted(set(row["cell"]) - known)
    if odd:
        raise ConfigError(
            f"a stored cell has the field {odd[0]!r}, which this version does not know. Use the version that wrote "
            "it, or another folder."
        )
    return Cell(**row["cell"])
