"""A subspace from a model's name: the package's own rows or the user's, and what it covers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_safety.artifact import SIDES
from peft_safety.data import CALIBRATION_PAIRS, calibration_rows, read_jsonl
from peft_safety.errors import ConfigError
from peft_safety.estimate.activations import METHODS
from peft_safety.estimate.coverage import ModuleCoverage, coverage, task_shares, warn_if_stalled
from peft_safety.estimate.targets import target_layers
from peft_safety.recipes.load import load_model
from peft_safety.subspace import SafetySubspace

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` made.

    Attributes:
        path: the file.
        coverage: module by module, for the input side; empty without one.
    """

    subspace: SafetySubspace
    path: Path
    coverage: list[ModuleCoverage]


def calibrate(
    model: str | Path | PreTrainedModel,
    out: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    data: str | Path | None = None,
    method: str = "salora",
    basis: str | None = None,
    rank: float | None = None,
    energy: float | None = None,
    per_kind: Mapping[str, float] | None = None,
    side: str | None = None,
    positions: str | None = None,
    task: str | Path | None = None,
    target_modules: str | list[str] = "all-linear",
    batch_size: int = 8,
    max_length: int = 512,
    seed: int = 0,
    allow_fewer: bool = False,
    progress: bool = True,
) -> Calibration:
    """Estimate a subspace, save it, and say what its input side covers.

    Args:
        model: as in `load_model`.
        out: file or directory.
        data: JSON lines; default the package's own for the method.
        method: "salora", "guardspace", "ortho_patch", or "weight" (no data).
        basis: which of the package's own rows; see `calibration_rows`.
        side: "in", "out" or "both".
        task: JSON lines of the benign task; at most 128 rows are read through the model.
        rank, energy, per_kind, positions: as in `estimate`.

    Raises:
        ConfigError: options that do not go together, before the model is loaded. CalibrationError, DataError: see `SafetySubspace.from_activations`.
    """
    if side is not None and side not in SIDES:
        raise ConfigError(f"side {side!r}. Use one of {', '.join(SIDES)}.")
    if rank is not None and energy is not None:
        raise ConfigError(f"rank {rank:g} and energy {energy:g}: give one of them.")
    if method == "weight" and (data or basis or per_kind or positions or task):
        raise ConfigError("method 'weight' reads weights only. Leave out data, basis, per_kind, positions and task.")
    sides = SIDES[side] if side is not None else METHODS[method][0] if method in METHODS else ("in",)
    if task is not None and "in" not in sides:
        raise ConfigError(f"method {method!r} has no input side here, so no task can lie in its null space. Use guardspace, or leave task out.")
    if data is not None and basis is not None:
        raise ConfigError(f"basis {basis!r} chooses among the package's own rows. Give either it or your own data.")
    options: dict[str, Any] = {"rank": rank, "energy": energy, "target_modules": target_modules, "seed": seed, "progress": progress}
    options |= {} if side is None else {"sides": SIDES[side]}
    rows = None if method == "weight" else calibration_rows(method, basis) if data is None else read_jsonl(data)
    task_rows = None if task is None else read_jsonl(task)[:CALIBRATION_PAIRS]
    loaded, tokenizer = load_model(model, tokenizer)
    reading: dict[str, Any] = {"tokenizer": tokenizer, "batch_size": batch_size, "max_length": max_length}
    if rows is None:
        subspace = SafetySubspace.from_weights(loaded, **options)
    else:
        extra = {"method": method, "positions": positions, "per_kind": per_kind or None, "allow_fewer": allow_fewer}
        subspace = SafetySubspace.from_activations(loaded, rows, **extra, **options, **reading)
    inputs = any("in" in sides for sides in subspace.bases.values())
    shares = None
    if task_rows is not None:
        shares = task_shares(loaded, target_layers(loaded, target_modules), subspace, task_rows, ranks=True, progress=progress, **reading)
        warn_if_stalled(shares)
    return Calibration(subspace, subspace.save(out), coverage(subspace, shares) if inputs else [])
