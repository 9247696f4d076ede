"""Does a leaf still hold its constraint?"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peft_safety.core import projection
from peft_safety.core.projection import Side
from peft_safety.errors import ProtectionError
from peft_safety.layers.protected_linear import ProtectedLinear, is_whole


def check_leaf(leaf: nn.Module, name: str, basis: Tensor | None, side: Side, residual: bool = False) -> None:
    """Refuse, by a ProtectionError, a leaf that does not hold the constraint: something else stands in its place, its
    basis is not `basis` (None for the other factor of an adapter with a residual), or a factor is not finite.
    """
    if not isinstance(leaf, ProtectedLinear) or leaf.side != side or (leaf.initial is not None) != residual:
        kind = type(leaf).__name__
        raise ProtectionError(f"{name}: a {kind} stands where a protected leaf belongs. Load the adapter again.")
    own = leaf.basis
    if own is None or basis is None:
        equal = own is basis
    else:
        equal = own.dtype == torch.float32 and torch.equal(own.cpu(), basis)
    if not equal:
        one, other = ("none" if u is None else f"{tuple(u.shape)} {u.dtype}" for u in (own, basis))
        raise ProtectionError(f"{name}: its basis ({one}) is not the subspace's ({other}). Load the adapter again.")
    if own is not None and is_whole(leaf.raw(), own, side):
        used = leaf.projected().detach()
        share, limit = (
            projection.leak(own.to(used.device), used.flatten(1), side),
            projection.leak_tolerance(used.dtype),
        )
        if share > limit:  # NaN is refused below
            raise ProtectionError(
                f"{name}: {share:.2g} of its factor leaks (limit {limit:.2g}). Load the adapter again."
            )
    for factor in (leaf.raw(), leaf.initial):
        if factor is None or hasattr(factor, "device_mesh") or factor.is_meta or projection.all_finite(factor):
            continue
        raise ProtectionError(
            f"{name}: a factor {tuple(factor.shape)} holds NaN or Inf. Lower the learning rate, and load the last "
            "good checkpoint."
        )
