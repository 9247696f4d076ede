"""Small NF4 weights with everything that a test wants to know about them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from peft_safety.ops import QuantBundle, from_quant_state, require

EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
"""Spacing of values just above 1."""


class Case(NamedTuple):
    q: QuantBundle
    dense: Tensor
    """`W (n, k)` in fp64, exactly what the bundle stands for."""
    a: Tensor
    bp: Tensor


def quantised(n: int, k: int, *, blocksize: int = 64, nested: bool = False, seed: int = 0) -> QuantBundle:
    from bitsandbytes.functional import quantize_4bit

    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=g) * torch.rand(n, 1, generator=g)
    packed, state = quantize_4bit(weight, blocksize=blocksize, quant_type="nf4", compress_statistics=nested)
    return require(from_quant_state(packed, state))


def case(n: int, k: int, r: int, *, blocksize: int = 64, nested: bool = False, seed: int = 0) -> Case:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=g) * torch.rand(n, 1, generator=g)
    packed, state = quantize_4bit(weight, blocksize=blocksize, quant_type="nf4", compress_statistics=nested)
    factors = torch.randn(r, k, generator=g) / k**0.5, torch.randn(n, r, generator=g) / r**0.5
    return Case(require(from_quant_state(packed, state)), dequantize_4bit(packed, state).double(), *factors)
