"""Subspaces from the weights, without data: the top singular directions of every target layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from peft_safety.calibration.activations import DEFAULT_RANK, model_name, sizes_of
from peft_safety.calibration.bases import output_basis
from peft_safety.calibration.leaving_out import cut, fitted, narrow_layers, record, without_room
from peft_safety.core import base_weights as weights
from peft_safety.core.projection import Side
from peft_safety.core.subspace import SafetySubspace
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
    progress: bool = True,
) -> SafetySubspace:
    """Top singular vectors of every target weight: right ones for side "in", left ones for side "out". Deterministic
    for a seed.

    Randomized subspace iteration with oversampling (`projection.OVERSAMPLING`, `bases.WEIGHT_ITERATIONS`); quantized
    weights are dequantized one at a time.

    Args:
        rank, energy, per_kind, target_modules, exclude_modules, layers: as in `activations.estimate`; the energy is
            that of the weight, `||W||_F^2`.

    Raises:
        ConfigError: a rank that leaves nothing to train, no module matched. CalibrationError: a weight that is zero or
            not finite.

    Reference: OrthoSafetyPatch, arXiv 2510.09004, whose diagnostics compare an update with these directions.
    """
    from tqdm.auto import tqdm

    if rank is None and energy is None:
        rank = DEFAULT_RANK
    targets = dict(target_layers(model, target_modules, exclude_modules) if layers is None else layers)
    unfit = without_room(targets, sides)
    layers = {name: layer for name, layer in targets.items() if name not in unfit}
    sizes = fitted(layers, sizes_of(targets, rank, energy, per_kind or {}), sides, weights_only=True)
    narrow = {side: narrow_layers(layers, side, weights_only=True) for side in sides}
    bases: dict[str, dict[Side, Tensor]] = {}
    spectra: dict[str, dict[Side, Tensor]] = {}
    for name, layer in tqdm(layers.items(), desc="weight bases", unit="module", disable=not progress):
        weight = weights.dense_weight(layer, name)
        pairs = {
            side: output_basis(weight if side == "out" else weight.mT, None, sizes[name][side], name, seed=seed)
            for side in sides
        }
        pairs = {side: cut(*pair) if name in narrow[side] else pair for side, pair in pairs.items()}
        bases[name], spectra[name] = ({side: pair[index] for side, pair in pairs.items()} for index in (0, 1))
    provenance = {"method": "weight", "sides": "+".join(sides), "seed": seed, "model": model_name(model)}
    provenance |= ({"rank": rank} if energy is None else {"energy": energy}) | (
        {"per_kind": dict(per_kind)} if per_kind else {}
    )
    provenance |= record([], unfit)
    subspace = SafetySubspace(bases, spectra, provenance=provenance)
    subspace.bind(layers)
    return subspace
