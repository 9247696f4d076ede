"""How much of an update lies in a subspace that it was not made for."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from torch import Tensor

from peft_safety.core.projection import Side, delta_leak, fits, is_tokens
from peft_safety.core.subspace import SafetySubspace

DIMENSIONS: tuple[tuple[Side, int], ...] = (("in", 1), ("out", 0))
"""Constraints on an update `(m, n)`, and the dimension of it that they are about."""


def shares(space: SafetySubspace, factors: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """`||dW Q|| / ||dW||` of each module with a basis, or `||U^T dW|| / ||dW||` where that is more.

    Args:
        factors: `lora_A (r, n)` and `lora_B (m, r)` by module. One whose basis has another size is left out.
    """
    result = {}
    for name, (a, b) in factors.items():
        features = (len(b), a.shape[1])
        sides = space.bases.get(name, {})
        known = [
            (sides[side], side) for side, place in DIMENSIONS if side in sides and fits(sides[side], features[place])
        ]
        if known:
            result[name] = max(delta_leak(u, a, b, side) for u, side in known)
    return result


def acting(space: SafetySubspace, factors: Mapping[str, tuple[Tensor, Tensor]]) -> str:
    """The same in words, for an error: worst module with its shapes, median, and modules without a basis."""
    found = shares(space, factors)
    if not found:
        return f"that subspace has no basis that fits any of its {len(factors)} modules"
    worst = max(found, key=lambda name: found[name])
    sizes = [len(u) if is_tokens(u) else tuple(u.shape) for u in space.bases[worst].values()]
    shapes = f"lora_A {tuple(factors[worst][0].shape)}, basis {' and '.join(map(str, sizes))}"
    text = f"in that subspace lies {found[worst]:.1%} of its update of {worst} ({shapes}), "
    text += f"{statistics.median(found.values()):.1%} in the median of {len(found)} modules"
    lacking = len(factors) - len(found)
    return text + (f"; {lacking} modules have no basis there that fits" if lacking else "")
