"""A subspace from a model's name: the package's own rows or the user's, and what it covers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_safety.calibration.activations import METHODS
from peft_safety.calibration.cost import CalibrationCost, cost
from peft_safety.calibration.coverage import ModuleCoverage, coverage, task_inputs, warn_if_stalled
from peft_safety.calibration.sizes import check_size_options
from peft_safety.core.subspace import DEFAULT_DTYPE, SafetySubspace
from peft_safety.core.targets import target_layers
from peft_safety.data import CALIBRATION_PAIRS, calibration_rows, rows_of
from peft_safety.data.rows import Rows
from peft_safety.errors import ConfigError
from peft_safety.methods.ortho_patch.config import SIDES
from peft_safety.recipes.load import load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


CHOICES = ("basis", "side", "positions", "safety_rank", "safety_energy", "safety_rank_pattern")
"""Options of `calibrate` that `estimate` has under other names, or not at all."""


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
    method: str = "guardspace",
    basis: str | None = None,
    safety_rank: int | float | None = None,
    safety_energy: float | None = None,
    safety_rank_pattern: Mapping[str, int | float] | None = None,
    side: str | None = None,
    positions: str | None = None,
    task_data: str | Path | Rows | None = None,
    target_modules: str | list[str] = "all-linear",
    batch_size: int = 8,
    max_length: int = 512,
    seed: int = 0,
    memory: str | int | None = None,
    dtype: str = DEFAULT_DTYPE,
    stream: bool = False,
    allow_fewer: bool = False,
    progress: bool = True,
) -> Calibration:
    """Estimate a subspace, save it, and say what its input side covers.

    Args:
        model: as in `load_model`.
        out: file or directory.
        data: JSON lines or rows; default the package's own for the method.
        method: "guardspace", "salora", "ortho_patch", or "weight" (no data).
        basis: which of the package's own rows; see `calibration_rows`.
        safety_rank, safety_energy, safety_rank_pattern: size of the subspace, as in the configs.
        side: "in", "out" or "both".
        positions, memory, dtype, allow_fewer: as in `estimate`.
        stream: as in `load_model`. Every batch of every pass then reads the model's files once, so use a large
            `batch_size`.
        task_data: JSON lines or rows of the benign task; at most 128 are read through the model.

    Raises:
        ConfigError: options that do not go together, before the model is loaded. CalibrationError, DataError: see
            `SafetySubspace.from_activations`.
    """
    common = _checked(locals())
    reading: dict[str, Any] = {"batch_size": batch_size, "max_length": max_length}
    estimating: dict[str, Any] = {"seed": seed, "progress": progress, "dtype": dtype}
    if method == "weight":
        subspace = SafetySubspace.from_weights(load_model(model, tokenizer, stream=stream)[0], **common, **estimating)
        return Calibration(subspace, subspace.save(out), coverage(subspace))
    rows = calibration_rows(method, basis) if data is None else rows_of(data, "calibration data")
    task_rows = None if task_data is None else rows_of(task_data, "task_data")[:CALIBRATION_PAIRS]
    loaded, reading["tokenizer"] = load_model(model, tokenizer, stream=stream)
    estimating |= {"allow_fewer": allow_fewer, "memory": memory}
    subspace = SafetySubspace.from_activations(loaded, rows, **common, **estimating, **reading)
    shares = None
    if task_rows is not None:
        layers = target_layers(loaded, target_modules)
        shares = task_inputs(loaded, layers, subspace, task_rows, ranks=True, progress=progress, **reading)[1]
        warn_if_stalled(shares)
    return Calibration(subspace, subspace.save(out), coverage(subspace, shares))


def calibration_cost(
    model: str | Path | PreTrainedModel,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    data: str | Path | Rows | None = None,
    method: str = "guardspace",
    target_modules: str | list[str] = "all-linear",
    stream: bool = False,
    **options: Any,
) -> CalibrationCost:
    """What `calibrate` will take. Loads the model and runs two batches; nothing is written.

    Args:
        options: as in `calibrate`: `basis`, the sizes, `side`, `positions`, `memory`, `dtype`, `batch_size`,
            `max_length`.

    Raises:
        ConfigError, CalibrationError: as `calibrate` does; method "weight", which needs no pass.
    """
    common = _checked({**options, "data": data, "method": method, "target_modules": target_modules})
    if method == "weight":
        raise ConfigError("method 'weight' needs no pass over the model, so there is nothing to foresee. Just run it.")
    rows = calibration_rows(method, options.get("basis")) if data is None else rows_of(data, "calibration data")
    loaded, tokenizer = load_model(model, tokenizer, stream=stream)
    rest = {name: value for name, value in options.items() if name not in CHOICES}
    return cost(loaded, rows, tokenizer=tokenizer, **common, **rest)


def _checked(given: Mapping[str, Any]) -> dict[str, Any]:
    """What `prepare` or `estimate_from_weights` needs of these options, checked before a model is loaded."""
    method, side, basis = given["method"], given.get("side"), given.get("basis")
    if side is not None and side not in SIDES:
        raise ConfigError(f"side {side!r}. Use one of {', '.join(SIDES)}.")
    rank, energy, kinds = (given.get(f"safety_{name}") for name in ("rank", "energy", "rank_pattern"))
    check_size_options(rank, energy, kinds, "calibrate")
    if method == "weight" and any(given.get(name) is not None for name in ("data", "basis", "positions", "task_data")):
        raise ConfigError("method 'weight' reads weights only. Leave out data, basis, positions and task_data.")
    if given["data"] is not None and basis is not None:
        raise ConfigError(f"basis {basis!r} chooses among the package's own rows. Give either it or your own data.")
    sides = SIDES[side] if side is not None else METHODS[method][0] if method in METHODS else ("in",)
    if given.get("task_data") is not None and "in" not in sides:
        raise ConfigError(
            f"method {method!r} has no input side here, so no task can lie in its null space. Use guardspace, or "
            "leave task_data out."
        )
    result = {"target_modules": given["target_modules"], "rank": rank, "energy": energy, "per_kind": kinds}
    result |= {} if side is None else {"sides": SIDES[side]}
    return result if method == "weight" else result | {"method": method, "positions": given.get("positions")}
