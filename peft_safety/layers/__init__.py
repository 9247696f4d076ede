"""The mechanism: a protected leaf in place of `lora_A` or `lora_B` (leaf.py), folding after optimizer steps
(folding.py), bases held once (sharing.py), factors that lie in memory as new ones do (layout.py)."""

from peft_safety.layers.folding import fold_together
from peft_safety.layers.layout import fresh
from peft_safety.layers.leaf import (
    ProtectedLinear,
    check_leaf,
    joined,
    lay_out_adapter,
    live_leaves,
    protected_leaves,
    stored_factors,
)
from peft_safety.layers.sharing import rebase

__all__ = [
    "ProtectedLinear",
    "check_leaf",
    "fold_together",
    "fresh",
    "joined",
    "lay_out_adapter",
    "live_leaves",
    "protected_leaves",
    "rebase",
    "stored_factors",
]
