"""Wrapped around the forward of PEFT's LoRA layer on 4-bit weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from peft_safety import fused


def linear4bit_forward(original: Callable[..., Tensor], self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The fused path where the layer is eligible and nothing but `x` was passed: mixed batches and variants come with
    arguments.
    """
    found = None if args or any(value is not None for value in kwargs.values()) else fused.forward(self, x)
    return original(self, x, *args, **kwargs) if found is None else found
