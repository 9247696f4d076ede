"""The reference backend in plain torch, equal to the last bit to bitsandbytes; the kernels are tested against it."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from peft_safety.ops.quant import QuantBundle

NF4_CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The values of NF4: QLoRA, arXiv 2305.14314, appendix E."""


@cache
def code(device: torch.device) -> Tensor:
    """`NF4_CODE (16,)` fp32 on a device, cached: a CUDA graph cannot capture a copy from the host."""
    return torch.tensor(NF4_CODE, device=device)


@cache
def pairs(device: torch.device) -> Tensor:
    """`(256, 2)` fp32: the two values of a packed byte, the first from its high half."""
    byte = torch.arange(256, device=device)
    return torch.stack([code(device)[byte >> 4], code(device)[byte & 15]], dim=1)


def scales(q: QuantBundle) -> Tensor:
    """The fp32 scale of each block, `(n * k / blocksize,)`, two roundings as in bitsandbytes: product, then sum."""
    if q.absmax2 is None or q.code2 is None or q.offset is None:
        return q.absmax
    values = q.code2[q.absmax.int()]
    blocks = torch.arange(values.numel(), device=values.device) // q.blocksize2
    return values * q.absmax2[blocks] + q.offset


def unrounded(q: QuantBundle) -> Tensor:
    """`W (n, k)` in fp32. A pair of values is looked up as one 64-bit word, which takes half the time."""
    words = pairs(q.wq.device).view(torch.int64).reshape(-1)
    values = words.index_select(0, q.wq.reshape(-1).int()).view(torch.float32)
    return values.view(-1, q.blocksize).mul_(scales(q).unsqueeze(1)).view(q.n, q.k)


def nf4_dequant(q: QuantBundle, dtype: torch.dtype) -> Tensor:
    return unrounded(q).to(dtype)


def lora_z(x: Tensor, a: Tensor) -> Tensor:
    """`z = x A^T (t, r)` in the wider dtype of `x (t, k)` and `A (r, k)`."""
    wide = torch.promote_types(x.dtype, a.dtype)
    return x.to(wide) @ a.to(wide).mT
