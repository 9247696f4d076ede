"""A subspace from a model's name: the package's own rows or the user's, and what it covers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_safety.calibration.cost import CalibrationCost, cost
from peft_safety.calibration.coverage import ModuleCoverage, coverage, task_inputs, warn_if_stalled
from peft_safety.calibration.estimators import SafetySubspace
from peft_safety.calibration.prepare import METHODS
from peft_safety.calibration.sizes import check_size_options
from peft_safety.core import files, subspace_file
from peft_safety.core.subspace import DEFAULT_DTYPE
from peft_safety.core.targets import target_layers
from peft_safety.data import CALIBRATION_PAIRS, calibration_rows, rows_of
from peft_safety.data.contexts import check_count, in_context
from peft_safety.data.rows import Rows
from peft_safety.errors import ConfigError
from peft_safety.methods.ortho_patch.config import SIDES
from peft_safety.recipes.load import load_model

READING = ("method", "positions", "memory", "dtype", "batch_size", "max_length")


@dataclass(frozen=True)
class CalibrationOptions:
    """Options of `calibrate` and `calibration_cost`.

    Attributes:
        method: "guardspace", "salora", "ortho_patch", or "weight" (no data).
        basis: which of the package's own rows; see `calibration_rows`.
        contexts: each row is also used so many times behind a random context; see `in_context`. 0 is none.
        safety_rank, safety_energy, safety_rank_pattern: size of the subspace, as in the configs.
        side: "in", "out" or "both"; default the method's own.
        positions, target_modules, batch_size, max_length, seed, memory, dtype, allow_fewer: as in `estimate`.
    """

    method: str = "guardspace"
    basis: str | None = None
    contexts: int = 0
    safety_rank: int | float | None = None
    safety_energy: float | None = None
    safety_rank_pattern: Mapping[str, int | float] | None = None
    side: str | None = None
    positions: str | None = None
    target_modules: str | list[str] = "all-linear"
    batch_size: int = 8
    max_length: int = 512
    seed: int = 0
    memory: str | int | None = None
    dtype: str = DEFAULT_DTYPE
    allow_fewer: bool = False
    progress: bool = True

    def check(self, data: Any, task_data: Any = None) -> None:
        """Refuse options that do not go together, before a model is loaded."""
        if self.side is not None and self.side not in SIDES:
            raise ConfigError(f"side {self.side!r}. Use one of {', '.join(SIDES)}.")
        check_size_options(self.safety_rank, self.safety_energy, self.safety_rank_pattern, "calibrate")
        check_count(self.contexts)
        given = (data, self.basis, self.contexts or None, self.positions, task_data)
        if self.method == "weight" and any(x is not None for x in given):
            raise ConfigError(
                "method 'weight' reads weights only. Leave out data, basis, contexts, positions and task_data."
            )
        if data is not None and self.basis is not None:
            raise ConfigError(f"basis {self.basis!r} is of the package's own rows. Give either it or your own data.")
        if task_data is not None and not self.has_inputs:
            problem = f"method {self.method!r} has no input side here, so no task can lie in its null space"
            raise ConfigError(f"{problem}. Use guardspace, or leave task_data out.")

    @property
    def has_inputs(self) -> bool:
        """Whether a basis of each layer's inputs is calibrated."""
        own = METHODS[self.method][0] if self.method in METHODS else ("in",)
        return "in" in (own if self.side is None else SIDES.get(self.side, own))

    def check_drawn(self) -> None:
        """Refuse, before a model is loaded, to draw the energy that an input side covers where none is measured."""
        if self.method == "weight" or not self.has_inputs:
            problem = f"method {self.method!r} does not measure the energy of an input side here, so none can be drawn"
            raise ConfigError(f"{problem}. Use guardspace, or leave out --png.")

    def arguments(self, *names: str) -> dict[str, Any]:
        """Sizes, sides and targets as `estimate` takes them, and further options by name."""
        sizes = {"rank": self.safety_rank, "energy": self.safety_energy, "per_kind": self.safety_rank_pattern}
        sides = {} if self.side is None else {"sides": SIDES[self.side]}
        return {**sizes, **sides, **{name: getattr(self, name) for name in ("target_modules", *names)}}


@dataclass(frozen=True)
class Calibration:
    """A subspace, its file, and what it covers: module by module for the input side, empty without one."""

    subspace: SafetySubspace
    path: Path
    coverage: list[ModuleCoverage]


def calibrate(
    model: str | Path | PreTrainedModel,
    out: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    data: str | Path | Rows | None = None,
    task_data: str | Path | Rows | None = None,
    stream: bool = False,
    **options: Any,
) -> Calibration:
    """Estimate a subspace, save it to a file or directory, and say what its input side covers.

    Args:
        data: JSON lines or rows; default the package's own for the method.
        task_data: JSON lines or rows of the benign task; at most 128 are read through the model.
        model, stream: as in `load_model`. Streaming reads the model's files once a batch: use a large `batch_size`.
        **options: see `CalibrationOptions`.

    Raises:
        ConfigError, ArtifactError: options that do not go together, or a place that cannot be written; before the
            model is loaded.
        CalibrationError, DataError: see `SafetySubspace.from_activations`.
    """
    chosen = CalibrationOptions(**options)
    chosen.check(data, task_data)
    files.check_place(subspace_file.file_of(Path(out)))
    if chosen.method == "weight":
        loaded = load_model(model, tokenizer, stream=stream)[0]
        subspace = SafetySubspace.from_weights(loaded, **chosen.arguments("seed", "dtype", "progress"))
        return Calibration(subspace, subspace.save(out), coverage(subspace))
    rows = _rows(chosen, data)
    task_rows = None if task_data is None else rows_of(task_data, "task_data")[:CALIBRATION_PAIRS]
    loaded, tokenizer = load_model(model, tokenizer, stream=stream)
    arguments = chosen.arguments(*READING, "seed", "allow_fewer", "progress")
    rows = with_contexts(rows, chosen, tokenizer)
    subspace = SafetySubspace.from_activations(loaded, rows, tokenizer=tokenizer, **arguments)
    if chosen.contexts:
        subspace.provenance["contexts"] = chosen.contexts
    shares = None
    if task_rows is not None:
        layers = target_layers(loaded, chosen.target_modules)
        reading = {name: getattr(chosen, name) for name in ("batch_size", "max_length", "progress")}
        shares = task_inputs(loaded, layers, subspace, task_rows, tokenizer=tokenizer, ranks=True, **reading)[1]
        warn_if_stalled(shares)
    return Calibration(subspace, subspace.save(out), coverage(subspace, shares))


def calibration_cost(
    model: str | Path | PreTrainedModel,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    data: str | Path | Rows | None = None,
    stream: bool = False,
    **options: Any,
) -> CalibrationCost:
    """What `calibrate` will take. Loads the model and runs two batches; nothing is written.

    Args:
        model: Hub id, directory, or a loaded causal language model.
        tokenizer: default the model's own.
        data: as in `calibrate`; default the package's prompts.
        stream: the cost of reading the model from disk, one layer at a time.
        **options: as in `calibrate`: `basis`, `contexts`, the sizes, `side`, `positions`, `memory`, `dtype`,
            `batch_size`, `max_length`.

    Returns:
        A `CalibrationCost`: tokens, bytes and seconds.

    Raises:
        ConfigError, CalibrationError: as `calibrate` does; method "weight", which needs no pass.
    """
    chosen = CalibrationOptions(**options)
    chosen.check(data)
    if chosen.method == "weight":
        raise ConfigError("method 'weight' needs no pass over the model, so there is nothing to foresee. Just run it.")
    rows = _rows(chosen, data)
    loaded, tokenizer = load_model(model, tokenizer, stream=stream)
    return cost(loaded, with_contexts(rows, chosen, tokenizer), tokenizer=tokenizer, **chosen.arguments(*READING))


def _rows(options: CalibrationOptions, data: Any) -> Rows:
    return calibration_rows(options.method, options.basis) if data is None else rows_of(data, "calibration data")


def with_contexts(rows: Rows, options: CalibrationOptions, tokenizer: PreTrainedTokenizerBase) -> Rows:
    """The rows bare, and `options.contexts` times in context."""
    return (
        [*rows, *in_context(rows, options.contexts, options.seed, tokenizer=tokenizer)] if options.contexts else rows
    )
