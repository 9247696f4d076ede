"""The mechanism: a protected leaf in place of `lora_A` or `lora_B`, and bases that are held once."""

from peft_safety.layers.frozen_linear import FrozenLinear, check_frozen, freeze
from peft_safety.layers.protected_linear import (
    DTYPE_READERS,
    ProtectedLinear,
    check_leaf,
    folded_state,
    joined,
    lay_out_adapter,
    protected_leaves,
    stored_factors,
)
from peft_safety.layers.shared_bases import rebase

__all__ = [
    "DTYPE_READERS",
    "FrozenLinear",
    "ProtectedLinear",
    "check_frozen",
    "check_leaf",
    "folded_state",
    "freeze",
    "joined",
    "lay_out_adapter",
    "protected_leaves",
    "rebase",
    "stored_factors",
]
