"""A cell, what all cells share, and the name of a cell's file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from peft_safety.errors import ConfigError

SECOND = 48
"""Number of rows of the untrained task in both benchmarks."""


@dataclass(frozen=True)
class Cell:
    """One fine-tune and its measurement.

    Fields at their defaults do not enter the name of a cell. So a new field needs a default that means "as before":
    then finished cells keep their names.

    Attributes:
        arm: a key of `arms.ARMS`.
        poison: share of the training rows that are a simulated attack.
        basis, fraction, positions, calibration: of GuardSpace's null space; empty for arms without one.
        epochs, lr, seed: of the fine-tune.
        split: which prompts are measured.
        knobs: settings of the other methods, `name=value` separated by commas.
        control: "" is the method itself, "random" has a random basis of equal size, "scaled" is plain LoRA scaled to
            the norm of the method.
        load: "" is fp32, "nf4" a 4-bit base.
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
        """The cell of the arm "lora" or "aligned" that this one is compared with."""
        plain = replace(self, arm=arm, basis="", fraction=0.0, positions="", calibration=0, knobs="", control="")
        return replace(plain, poison=0.0, epochs=0, lr=0.0, seed=0) if arm == "aligned" else plain

    @property
    def method(self) -> Cell:
        """The cell without its place in the grid: equal for all cells of one row of a table."""
        return replace(self, poison=0.0, seed=0, split="")

    def options(self) -> dict[str, Any]:
        """The knobs by name; numbers where the text is a number.

        Raises:
            ConfigError: a knob without `=`.
        """
        options: dict[str, Any] = {}
        for part in filter(None, self.knobs.split(",")):
            name, equals, text = part.partition("=")
            if not equals or not name:
                raise ConfigError(
                    f"knob {part!r} of arm {self.arm!r} has no value. Write name=value, separated by commas."
                )
            options[name] = _value(text)
        return options

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
    """The cells whose results a cell reads. A "scaled" cell needs the norm of its method."""
    return [replace(cell, control="")] if cell.control == "scaled" else []


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


PATCH = "4"
"""The safety patch that aligns the model today: that of `benchmarks/data/patch`."""


@dataclass(frozen=True)
class Protocol:
    """What all cells share. It is a part of the name of each cell. For new fields see `Cell`.

    Attributes:
        rows: number of training rows of the task.
        limit: largest number of prompts and of task rows of each kind.
        aligned: name of the aligned model.
        r, max_length: of the fine-tune.
        sets: additional prompt sets by name, with a hash of their prompts; for test cells only.
        second: number of rows of a second, untrained task; for test cells only, 0 leaves it out.
        task: hash of the rows of the task; empty for the package's own task.
        judges: names of judges in addition to the keyword matcher.
        tokens: length of a response that is judged.
        patch: the recipe that aligned the model; empty for the first recipe and for a model that was given.
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
        """Name of a cell's file. Validation cells use only the package's own prompts, so their names do not depend on
        the additional sets.
        """
        shared = self if cell.split == "test" else replace(self, sets={}, second=0)
        return _digest(_set(cell), _set(shared))

    def adapter_key(self, cell: Cell) -> str:
        """Name of a cell's adapter. It does not depend on the prompts, except for long fine-tunes, which are measured
        while they train.
        """
        place = cell if cell.epochs > 1 else replace(cell, split="")
        return _digest(
            _set(place),
            {name: getattr(self, name) for name in ("rows", "aligned", "r", "max_length", "task", "patch")},
        )


def _set(record: Any) -> dict[str, Any]:
    """The fields that differ from their defaults. So a new field does not change the names of finished cells."""
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
    unknown = sorted(set(row["cell"]) - known)
    if unknown:
        raise ConfigError(
            f"a stored cell has the field {unknown[0]!r}, which this version does not know. Use the version that "
            "wrote it, or another folder."
        )
    return Cell(**row["cell"])
