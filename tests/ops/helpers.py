"""Small NF4 weights with everything that a test wants to know about them."""

from __future__ import annotations

from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

from peft_safety.ops import QuantBundle, from_quant_state, require

EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
"""Spacing of values just above 1."""


GUARD = 4096
"""Bytes on either side of a buffer that must not change."""


class Case(NamedTuple):
    q: QuantBundle
    dense: Tensor
    """`W (n, k)` in fp64, exactly what the bundle stands for."""
    a: Tensor
    bp: Tensor


def quantized(n: int, k: int, *, blocksize: int = 64, nested: bool = False, seed: int = 0) -> QuantBundle:
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


def writes_out_of_bounds(q: QuantBundle) -> list[str]:
    """Run every kernel on buffers between guards, and name the buffers whose guards have changed."""
    from peft_safety.ops import triton_backend

    guarded: list[tuple[str, Tensor, int]] = []

    def empty(*size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        length = torch.Size(size).numel() * dtype.itemsize
        whole = torch.full((length + 2 * GUARD,), 0xA5, dtype=torch.uint8, device=device)
        guarded.append((f"{size} {dtype}", whole, length))
        return whole[GUARD : GUARD + length].view(dtype).view(size)

    device = q.wq.device
    rows = triton_backend.Z_TILE.rows + 1
    a, x = (torch.randn(*size, device=device) for size in ((5, q.k), (rows, q.k)))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        given = x.to(dtype)
        with mock.patch.object(torch, "empty", empty):
            triton_backend.nf4_dequant(q, dtype)
            triton_backend.lora_z(given, a)
    if len(guarded) != 1 + 2 + 2:  # an fp32 product with A is torch's own
        raise AssertionError(f"{len(guarded)} buffers came from torch.empty")
    return [
        name
        for name, whole, length in guarded
        if bool((whole[:GUARD] != 0xA5).any() | (whole[GUARD + length :] != 0xA5).any())
    ]
