"""Subspaces from the weights, without data: the top singular directions of every target layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from peft_safety.calibration.bases import output_basis_in_groups
from peft_safety.calibration.leaving_out import record
from peft_safety.calibration.models import model_name
from peft_safety.calibration.prepare import size_facts
from peft_safety.calibration.sizes import DEFAULT_RANK, plan
from peft_safety.core import base_weights as weights
from peft_safety.core import kinds
from peft_safety.core.projection import Side
from peft_safety.core.subspace import DEFAULT_DTYPE, SafetySubspace
from peft_safety.core.targets import target_layers


def estimate_from_weights(
    model: nn.Module,
    *,
    rank: float | None = None,
    energy: float | None = None,
    per_kind: Mapping[str, float] | None = None,
    sides: Sequence[Side] = ("in",),
    target_modules: Iterable[str] | str | None = None,
    exclude_modules: Iterable[str] | str | None = None,
    layers: Mapping[str, nn.Module] | None = None,
    seed: int = 0,
    dtype: str = DEFAULT_DTYPE,
    progress: bool = True,
) -> SafetySubspace:
    """Top singular vectors of every target weight: right ones for side "in", left ones for side "out".

    By randomized subspace iteration, deterministic for a seed. Quantized weights are dequantized one at a time.

    Args:
        rank, energy, per_kind, target_modules, exclude_modules, layers, dtype: as in `activations.estimate`; the
            energy is that of the weight, `||W||_F^2`.

    Raises:
        ConfigError: a rank that leaves nothing to train, no module matched. CalibrationError: a weight that is zero or
            not finite.

    Reference: OrthoSafetyPatch, arXiv 2510.09004, whose diagnostics compare an update with these directions.
    """
    from tqdm.auto import tqdm

    if rank is None and energy is None:
        rank = DEFAULT_RANK
    targets = dict(target_layers(model, target_modules, exclude_modules) if layers is None else layers)
    sizes, unfit = plan(targets, rank, energy, per_kind, sides, weights_only=True)
    layers = {name: targets[name] for name in sizes}
    bases: dict[str, dict[Side, Tensor]] = {name: {} for name in layers}
    spectra: dict[str, dict[Side, Tensor]] = {name: {} for name in layers}
    for name, layer in tqdm(layers.items(), desc="weight bases", unit="module", disable=not progress):
        weight = weights.dense_weight(layer, name)
        for side, size in sizes[name].items():
            blocks = kinds.groups(layer) if side == "out" else 1
            side_first = weight if side == "out" else weight.mT
            u, s = output_basis_in_groups(side_first, None, size, blocks, name, seed=seed)
            bases[name][side], spectra[name][side] = u[:, : size.most], s[: size.most]
    provenance = {"method": "weight", "sides": "+".join(sides), "seed": seed, "model": model_name(model)}
    provenance |= size_facts(rank, energy, per_kind) | record([], unfit)
    subspace = SafetySubspace(bases, spectra, provenance=provenance).rounded(dtype)
    subspace.bind(layers)
    return subspace
