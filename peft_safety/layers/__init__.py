"""The mechanism: a protected leaf in place of `lora_A` or `lora_B`, and bases that are held once."""

from peft_safety.layers.frozen_linear import FrozenLinear
from peft_safety.layers.protected_linear import ProtectedLinear, protected_leaves
from peft_safety.layers.stored import joined, stored_factors

__all__ = ["FrozenLinear", "ProtectedLinear", "joined", "protected_leaves", "stored_factors"]
