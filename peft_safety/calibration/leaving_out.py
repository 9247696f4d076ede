"""Layers that a basis cannot be made for: those the data do not reach, and those too narrow to keep anything free. And
narrow ones that take a smaller basis.

They are recorded in the subspace's provenance. An adapter leaves them out: a layer without inputs has nothing to
protect, but must not be trained unprotected.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from peft_safety.calibration.bases import Size
from peft_safety.core import base_weights as weights
from peft_safety.core.names import listed
from peft_safety.core.projection import Side
from peft_safety.core.subspace import NARROW, UNREACHED, SafetySubspace
from peft_safety.errors import ConfigError

NARROW_SHARE = 4
"""A layer is narrow if it is this many times narrower than the median target layer (a head, a gate). Only narrow
layers get a smaller basis than requested; for ordinary layers, a rank that is too large is an error."""
SAID = {UNREACHED: "no token that counts reaches", NARROW: "a single feature leaves no direction free in"}


def width(layer: nn.Module, side: Side, weights_only: bool = False) -> int:
    """Largest number of directions of a side: its features, limited by the inputs' (or the weight's) rank."""
    m, n = weights.shape(layer)
    return n if side == "in" and not weights_only else min(m, n)


def narrow_layers(layers: Mapping[str, nn.Module], side: Side, weights_only: bool = False) -> set[str]:
    """The layers that are far narrower than the others."""
    widths = {name: width(layer, side, weights_only) for name, layer in layers.items()}
    return {name for name, size in widths.items() if size * NARROW_SHARE <= statistics.median_low(widths.values())}


def without_room(layers: Mapping[str, nn.Module], sides: Sequence[Side]) -> list[str]:
    """Layers with a single feature on one of the sides: whatever is protected there, nothing is left to train.

    Raises:
        ConfigError: all of them are.
    """
    narrow = [
        name
        for name, layer in layers.items()
        if any(weights.shape(layer)[0 if side == "out" else 1] < 2 for side in sides)
    ]
    if len(narrow) == len(layers):
        raise ConfigError(f"{listed(narrow)}: a single feature leaves no direction free. Use other target_modules.")
    return narrow


def fitted(
    layers: Mapping[str, nn.Module], sizes: Mapping[str, Size], sides: Sequence[Side], weights_only: bool = False
) -> dict[str, dict[Side, Size]]:
    """The size of each basis, by side; narrow layers that cannot hold a rank take what they can, with one warning.

    Raises:
        ConfigError: a rank that an ordinary layer cannot hold.
    """
    narrow = {side: narrow_layers(layers, side, weights_only) for side in sides}
    result: dict[str, dict[Side, Size]] = {name: dict.fromkeys(sides, sizes[name]) for name in layers}
    reduced = {}
    for name, layer in layers.items():
        for side in sides:
            m, n = weights.shape(layer)
            most = min((m if side == "out" else n) - 1, width(layer, side, weights_only))
            rank = sizes[name].rank
            if rank is not None and rank > most and name in narrow[side]:
                result[name][side], reduced[name] = replace(sizes[name], rank=most), most
            result[name][side].fixed((m, n), side, name)
    if reduced:
        warnings.warn(
            f"{len(reduced)} of {len(layers)} layers are too narrow for the rank that was asked for, and protect "
            "fewer directions (at least "
            f"{min(reduced.values())}): {listed(reduced)}.",
            stacklevel=4,
        )
    return result


def cut(basis: Tensor, spectrum: Tensor) -> tuple[Tensor, Tensor]:
    """The basis of a narrow layer, cut so that at least one direction stays free."""
    most = basis.shape[0] - 1
    return basis[:, :most], spectrum[:most]


def record(unreached: Iterable[str], narrow: Iterable[str]) -> dict[str, dict[str, list[str]]]:
    """The `left_out` entry of the provenance; empty if no layer is left out."""
    result = {reason: sorted(names) for reason, names in ((UNREACHED, unreached), (NARROW, narrow))}
    result = {reason: names for reason, names in result.items() if names}
    return {"left_out": result} if result else {}


def warn_left_out(left_out: Mapping[str, str], total: int, what: str, *, stacklevel: int = 3) -> None:
    """One warning that counts and names the layers.

    Args:
        left_out: reasons by name.
        what: what they are left out of.
    """
    if not left_out:
        return
    by_reason = {reason: [name for name, why in left_out.items() if why == reason] for reason in SAID}
    reasons = "; ".join(f"{SAID[reason]} {listed(names)}" for reason, names in by_reason.items() if names)
    warnings.warn(
        f"{len(left_out)} of {total} target layers are left out of {what}: {reasons}.", stacklevel=stacklevel + 1
    )


def announced(subspace: SafetySubspace) -> SafetySubspace:
    """Warn about the layers that a subspace leaves out, and return it."""
    left_out = subspace.left_out
    warn_left_out(
        left_out, len(left_out) + len(subspace.bases), "the subspace, and so of an adapter on it", stacklevel=4
    )
    return subspace
