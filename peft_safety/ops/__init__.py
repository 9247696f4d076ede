"""NF4 weights, adapters and projections as `torch.library` operations. They compile, differentiate, and run anywhere.
Importing this package loads torch, but neither Triton nor bitsandbytes.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from peft_safety.errors import OperationError
from peft_safety.ops import schemas  # noqa: F401  (registers the operations)
from peft_safety.ops.dispatch import backend_for
from peft_safety.ops.linear import SKINNY_ROWS
from peft_safety.ops.quant import QuantBundle, from_linear4bit, from_quant_state, require

__all__ = [
    "QuantBundle",
    "backend_for",
    "from_linear4bit",
    "from_quant_state",
    "nf4_dequant",
    "nf4_lora",
    "nf4_merged",
    "project_out",
    "require",
]

_OPS: Any = torch.ops.peft_safety


def nf4_dequant(q: QuantBundle, dtype: torch.dtype) -> Tensor:
    """`W (n, k)` in fp32, bf16 or fp16, equal to the last bit to `bitsandbytes.functional.dequantize_4bit`."""
    _check_dtype(dtype)
    return _OPS.nf4_dequant(*q, dtype)


def nf4_merged(q: QuantBundle, a: Tensor, bp: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """`W + scale * B' A (n, k)` of `lora_A (r, k)` and the projected `lora_B (n, r)`, rounded once. Differentiable in
    the factors. In 16 bits the sum holds a small update with noise only; see `exact` in `nf4_lora`.
    """
    _check_dtype(dtype)
    _check_factors(q, a, bp)
    return _OPS.nf4_merged(*q, a, bp, float(scale), dtype)


def nf4_lora(
    x: Tensor,
    q: QuantBundle,
    a: Tensor,
    bp: Tensor,
    scale: float,
    *,
    exact: bool = False,
    x_adapter: Tensor | None = None,
) -> Tensor:
    """`y = x W^T + scale * (x A^T) B'^T`, `(..., n)` in the dtype of `x`; gradients go to `x`, `x_adapter`, `a` and
    `bp`.

    More than `linear.SKINNY_ROWS` rows take one product with the merged weight, in both directions; fewer take two
    paths that read the packed weight. W is never saved for the backward pass, but made again.

    Args:
        x: `(..., k)`, fp32, bf16 or fp16. All products are in this dtype with fp32 accumulation.
        a, bp: `lora_A (r, k)` and the projected `lora_B (n, r)`, any float dtype.
        exact: base and adapter stay two paths at any size. In 16 bits a merged weight rounds `W + scale * B' A` to the
            spacing of W's values: for bf16 and an update of 1 % of W (1024 x 1024), noise of 0.23 of the update's
            length.
        x_adapter: the adapter's own input, like `x`, where dropout makes it another one. Implies two paths.

    Raises:
        OperationError: shapes, devices or dtypes that do not fit.
    """
    _check_dtype(x.dtype)
    _check_factors(q, a, bp)
    if x.dim() == 0 or x.shape[-1] != q.k or x.device != q.wq.device:
        shapes = f"x {tuple(x.shape)} on {x.device} for a weight ({q.n}, {q.k}) on {q.wq.device}"
        raise OperationError(f"{shapes}. Pass (..., {q.k}) on the device of the weight.")
    if x_adapter is not None and (x_adapter.shape != x.shape or x_adapter.dtype != x.dtype):
        given = f"x_adapter {tuple(x_adapter.shape)} {x_adapter.dtype}, but x {tuple(x.shape)} {x.dtype}"
        raise OperationError(f"{given}. Pass both alike.")
    merged = not exact and x_adapter is None and x.numel() // q.k > SKINNY_ROWS
    return _OPS.nf4_lora(x, x_adapter, *q, a, bp, float(scale), merged)[0]


def project_out(u: Tensor, w: Tensor, side: Literal["out", "in"] = "out") -> Tensor:
    """`w - u (u^T w)`, or `w - (w u) u^T` for side "in", as one op; differentiable in `w`. Computed in the wider dtype
    of `u (d, k)` and `w` whatever autocast says, and returned in that of `w`.
    """
    fits = u.dim() == w.dim() == 2 and side in ("out", "in") and u.shape[0] == w.shape[0 if side == "out" else 1]
    if not fits:
        shapes = f"a basis {tuple(u.shape)} for a factor {tuple(w.shape)} on side {side!r}"
        raise OperationError(f"{shapes}. The basis needs as many rows as the protected dimension.")
    return _OPS.project_out(u, w, side == "out")


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise OperationError(f"{dtype} is no compute dtype of a 4-bit weight. Use float32, bfloat16 or float16.")


def _check_factors(q: QuantBundle, a: Tensor, bp: Tensor) -> None:
    if a.dim() != 2 or bp.dim() != 2 or a.shape[1] != q.k or bp.shape[0] != q.n or a.shape[0] != bp.shape[1]:
        shapes = f"factors A {tuple(a.shape)} and B {tuple(bp.shape)} for a weight ({q.n}, {q.k})"
        raise OperationError(f"{shapes}. Pass (r, {q.k}) and ({q.n}, r).")
    if not a.device == bp.device == q.wq.device:
        raise OperationError(f"factors on {a.device} and {bp.device}, the weight on {q.wq.device}. Use one device.")
