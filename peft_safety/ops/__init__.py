"""NF4 weights and adapters as `torch.library` operations. They compile, differentiate, and run anywhere.
Importing this package loads torch, but neither Triton nor bitsandbytes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peft_safety.errors import OperationError
from peft_safety.ops import schemas  # noqa: F401  (registers the operations)
from peft_safety.ops.dispatch import backend, backend_for
from peft_safety.ops.quant import QuantBundle, from_linear4bit, from_quant_state, require

__all__ = [
    "QuantBundle",
    "backend_for",
    "from_linear4bit",
    "from_quant_state",
    "lora_z",
    "nf4_dequant",
    "nf4_lora",
    "require",
]

_OPS: Any = torch.ops.peft_safety


def nf4_dequant(q: QuantBundle, dtype: torch.dtype) -> Tensor:
    """`W (n, k)` in fp32, bf16 or fp16, equal to the last bit to `bitsandbytes.functional.dequantize_4bit`."""
    _check_dtype(dtype)
    weight: Tensor = backend(q.wq).nf4_dequant(q, dtype)
    return weight


def lora_z(x: Tensor, a: Tensor) -> Tensor:
    """`z = x A^T (..., r)` of `x (..., k)` and `lora_A (r, k)`, in the wider of their dtypes whatever autocast says.
    Differentiable; x is kept for the backward pass only if A takes a gradient.
    """
    if a.dim() != 2 or x.dim() == 0 or x.shape[-1] != a.shape[1] or x.device != a.device:
        shapes = f"x {tuple(x.shape)} on {x.device} for A {tuple(a.shape)} on {a.device}"
        raise OperationError(f"{shapes}. Pass (..., {a.shape[-1] if a.dim() else 'k'}) on the device of A.")
    z: Tensor = _OPS.lora_z(x, a)
    return z


def nf4_lora(x: Tensor, q: QuantBundle, z: Tensor, bp: Tensor, scale: float) -> Tensor:
    """`y = x W^T + scale * z B'^T`, `(..., n)` in the dtype of `x`; gradients go to `x`, `z` and `bp`. Neither x nor W
    is kept for the backward pass, in which W is made again.

    Args:
        x: `(..., k)`, fp32, bf16 or fp16. The base product is in this dtype, with fp32 accumulation.
        z: `(..., r)`, `lora_z` of what the adapter sees: x, or x after dropout.
        bp: the projected `lora_B (n, r)`. The adapter's product is in the wider dtype of `z` and `bp`.

    Raises:
        OperationError: shapes, devices or dtypes that do not fit.
    """
    _check_dtype(x.dtype)
    if x.dim() == 0 or x.shape[-1] != q.k or x.device != q.wq.device:
        shapes = f"x {tuple(x.shape)} on {x.device} for a weight ({q.n}, {q.k}) on {q.wq.device}"
        raise OperationError(f"{shapes}. Pass (..., {q.k}) on the device of the weight.")
    if bp.dim() != 2 or bp.shape[0] != q.n or z.shape != (*x.shape[:-1], bp.shape[1]):
        shapes = f"z {tuple(z.shape)} and B {tuple(bp.shape)} for x {tuple(x.shape)} and a weight ({q.n}, {q.k})"
        raise OperationError(f"{shapes}. Pass (..., r) and ({q.n}, r).")
    if not z.device == bp.device == x.device:
        raise OperationError(f"z on {z.device} and B on {bp.device}, x on {x.device}. Use one device.")
    y: Tensor = _OPS.nf4_lora(x, *q, z, bp, float(scale))
    return y


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise OperationError(f"{dtype} is no compute dtype of a 4-bit weight. Use float32, bfloat16 or float16.")
