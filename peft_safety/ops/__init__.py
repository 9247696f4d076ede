"""Operations on NF4 weights, adapters and projections, as `torch.library` ops that compile, differentiate, and run on any device.

Which backend runs: `dispatch.backend_for`. Importing this package loads torch, but neither Triton nor bitsandbytes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peft_safety.errors import OperationError
from peft_safety.ops import autograd as _autograd  # noqa: F401  (registers the derivatives)
from peft_safety.ops import linear
from peft_safety.ops.dispatch import backend_for
from peft_safety.ops.quant import QuantBundle, from_linear4bit, from_quant_state, require
from peft_safety.projection import Side

__all__ = [
    "QuantBundle",
    "backend_for",
    "diff_mul",
    "diff_tmul",
    "from_linear4bit",
    "from_quant_state",
    "nf4_dequant",
    "nf4_diff_mul",
    "nf4_diff_tmul",
    "nf4_gram_mul",
    "nf4_lora",
    "nf4_merged",
    "nf4_mul",
    "nf4_tmul",
    "project_out",
    "project_out_grouped",
    "require",
]

_OPS: Any = torch.ops.peft_safety
_COMPUTE = (torch.float32, torch.bfloat16, torch.float16)


def nf4_dequant(q: QuantBundle, dtype: torch.dtype) -> Tensor:
    """`W (n, k)` in fp32, bf16 or fp16, equal to the last bit to `bitsandbytes.functional.dequantize_4bit`.

    Raises:
        OperationError: another dtype.
    """
    _check_dtype(dtype)
    return _OPS.nf4_dequant(*q, dtype)


def nf4_merged(q: QuantBundle, a: Tensor, bp: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """`W + scale * B' A (n, k)`, in one pass over W and rounded once. Differentiable in the factors.

    Args:
        a: `lora_A (r, k)`.
        bp: the projected `lora_B (n, r)`.

    Raises:
        OperationError: shapes, devices or dtypes that do not fit.

    A 16-bit sum holds an update far below the spacing of W's values only with noise; see `exact` in `nf4_lora`.
    """
    _check_dtype(dtype)
    _check_factors(q, a, bp)
    return _OPS.nf4_merged(*q, a, bp, float(scale), dtype)


def nf4_lora(x: Tensor, q: QuantBundle, a: Tensor, bp: Tensor, scale: float, *, exact: bool = False, x_adapter: Tensor | None = None) -> Tensor:
    """`y = x W^T + scale * (x A^T) B'^T`, `(..., n)` in the dtype of `x`; gradients go to `x`, `x_adapter`, `a` and `bp`.

    More than `linear.SKINNY_ROWS` rows take one product with the merged weight, in both directions; fewer take two paths that read the packed weight. W is made
    again in the backward pass, and never saved.

    Args:
        x: `(..., k)`, fp32, bf16 or fp16, any strides; no rows are fine. All products are in this dtype with fp32 accumulation.
        a: `lora_A (r, k)`, any float dtype.
        bp: the projected `lora_B (n, r)`, any float dtype.
        exact: base and adapter stay two paths at any size. In 16 bits a merged weight rounds `W + scale * B' A` to the spacing of W's values: as much noise as
            rounding W itself makes, but for bf16 and an update of 1 % of W (1024 x 1024) that is 0.23 of the update's length, 0.04 in a span of 32.
        x_adapter: the adapter's own input, of the shape and dtype of `x`, where dropout makes it another one. Implies two paths.

    Raises:
        OperationError: shapes, devices or dtypes that do not fit.
    """
    _check_dtype(x.dtype)
    _check_factors(q, a, bp)
    if x.dim() == 0 or x.shape[-1] != q.k or x.device != q.wq.device:
        raise OperationError(f"x {tuple(x.shape)} on {x.device} for a weight ({q.n}, {q.k}) on {q.wq.device}. Pass (..., {q.k}) on that device.")
    if x_adapter is not None and (x_adapter.shape != x.shape or x_adapter.dtype != x.dtype):
        raise OperationError(f"x_adapter {tuple(x_adapter.shape)} {x_adapter.dtype} beside x {tuple(x.shape)} {x.dtype}. Both must be alike.")
    merged = linear.chosen(x.numel() // q.k, exact, x_adapter is not None)
    return _OPS.nf4_lora(x, x_adapter, *q, a, bp, float(scale), merged)[0]


@torch.no_grad()
def nf4_mul(q: QuantBundle, z: Tensor) -> Tensor:
    """`W z (n, r)` for `z (k, r)`, fp32, W by blocks of rows."""
    _check_rows(z, q.k, (q.n, q.k))
    return _OPS.nf4_mul(*q, z)


@torch.no_grad()
def nf4_tmul(q: QuantBundle, b: Tensor) -> Tensor:
    """`W^T b (k, r)` for `b (n, r)`, fp32, W by blocks of rows."""
    _check_rows(b, q.n, (q.n, q.k))
    return _OPS.nf4_tmul(*q, b)


def nf4_gram_mul(q: QuantBundle, x: Tensor, moment: Tensor | None = None) -> Tensor:
    """`W S W^T x (n, l)`, the step of a subspace iteration (`projection.top_eigenvectors`); `S (k, k)` is the identity without a moment."""
    t = nf4_tmul(q, x)
    return nf4_mul(q, t if moment is None else moment @ t)


@torch.no_grad()
def diff_mul(wa: Tensor, wb: Tensor, z: Tensor) -> Tensor:
    """`V z (m, r)` with `V = wa - wb (m, n)` and `z (n, r)`, in fp32 (fp64 for fp64), V by blocks of rows."""
    _check_same(tuple(wa.shape), tuple(wb.shape))
    _check_rows(z, wa.shape[1], tuple(wa.shape))
    return _OPS.diff_mul(wa, wb, z)


@torch.no_grad()
def diff_tmul(wa: Tensor, wb: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """`(V^T b (n, r), ||V||_F^2 ())` with `V = wa - wb (m, n)` and `b (m, r)`; the energy in fp64. Safe LoRA's projection of B is `diff_mul(.., V^T B)`."""
    _check_same(tuple(wa.shape), tuple(wb.shape))
    _check_rows(b, wa.shape[0], tuple(wa.shape))
    found: tuple[Tensor, Tensor] = _OPS.diff_tmul(wa, wb, b)
    return found


@torch.no_grad()
def nf4_diff_mul(qa: QuantBundle, qb: QuantBundle, z: Tensor) -> Tensor:
    """`diff_mul` of two NF4 weights. Their difference is mostly quantisation noise where the two models are close: prefer 16-bit weights."""
    _check_same((qa.n, qa.k), (qb.n, qb.k))
    _check_rows(z, qa.k, (qa.n, qa.k))
    return _OPS.nf4_diff_mul(*qa, *qb, z)


@torch.no_grad()
def nf4_diff_tmul(qa: QuantBundle, qb: QuantBundle, b: Tensor) -> tuple[Tensor, Tensor]:
    """`diff_tmul` of two NF4 weights; see `nf4_diff_mul`."""
    _check_same((qa.n, qa.k), (qb.n, qb.k))
    _check_rows(b, qa.n, (qa.n, qa.k))
    found: tuple[Tensor, Tensor] = _OPS.nf4_diff_tmul(*qa, *qb, b)
    return found


def project_out(u: Tensor, w: Tensor, side: Side = "out") -> Tensor:
    """`projection.project_out` as one op: computed in the dtype of `u (d, k)` whatever autocast says, returned in that of `w`; differentiable in `w`."""
    if u.dim() != 2 or w.dim() != 2 or u.shape[0] != w.shape[0 if side == "out" else 1]:
        raise OperationError(f"a basis {tuple(u.shape)} for a factor {tuple(w.shape)} on side {side!r}. Its rows must be the factor's protected dimension.")
    return _OPS.project_out(u, w, side == "out")


def project_out_grouped(u: Tensor, w: Tensor) -> Tensor:
    """`w - u (u^T w)` for `g` modules at once, `u (g, d, k)` and `w (g, d, r)`: two launches. Differentiable in `w`; factors of side "in" go in transposed."""
    if u.dim() != 3 or w.dim() != 3 or u.shape[:2] != w.shape[:2]:
        raise OperationError(f"bases {tuple(u.shape)} for factors {tuple(w.shape)}. Pass (g, d, k) and (g, d, r).")
    return _OPS.project_out_grouped(u, w)


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in _COMPUTE:
        raise OperationError(f"{dtype} is no compute dtype of a 4-bit weight. Use float32, bfloat16 or float16.")


def _check_factors(q: QuantBundle, a: Tensor, bp: Tensor) -> None:
    if a.dim() != 2 or bp.dim() != 2 or a.shape[1] != q.k or bp.shape[0] != q.n or a.shape[0] != bp.shape[1]:
        raise OperationError(f"factors A {tuple(a.shape)} and B {tuple(bp.shape)} for a weight ({q.n}, {q.k}). Pass (r, {q.k}) and ({q.n}, r).")
    if not a.device == bp.device == q.wq.device:
        raise OperationError(f"factors on {a.device} and {bp.device}, the weight ({q.n}, {q.k}) on {q.wq.device}. Move them to one device.")


def _check_rows(block: Tensor, rows: int, weight: tuple[int, ...]) -> None:
    if block.dim() != 2 or block.shape[0] != rows:
        raise OperationError(f"a block {tuple(block.shape)} for a weight {weight}. Pass ({rows}, r).")


def _check_same(first: tuple[int, ...], second: tuple[int, ...]) -> None:
    if first != second or len(first) != 2:
        raise OperationError(f"weights of shapes {first} and {second}. Both must be one (m, n).")
