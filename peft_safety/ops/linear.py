"""A linear layer of an NF4 weight with an adapter, forward and backward, from a backend's kernels and dense products.

With `y = x W^T + s (x A^T) B'^T`: `dz = s dY B'`, `dX = dY W + dz A`, `dA = dz^T x`, `dB' = s dY^T z`. W is never
saved: the backward pass makes it again.
"""

from __future__ import annotations

from torch import Tensor

from peft_safety.ops import dispatch, reference
from peft_safety.ops.quant import QuantBundle

SKINNY_ROWS = 64
"""Up to so many rows of x, reading W dominates: 0.5 bytes per packed weight, 4.5 if it is dequantized first. Few rows
take two paths; more rows take one product with the merged weight. bitsandbytes switches between 16 and 64 rows."""


def forward(
    x: Tensor, x_adapter: Tensor | None, q: QuantBundle, a: Tensor, bp: Tensor, scale: float, merged: bool
) -> tuple[Tensor, Tensor]:
    """`(y (..., n), z (t, r))`; z, which only the backward pass needs, is empty on the merged path."""
    kernels = dispatch.backend(x)
    rows = x.reshape(-1, q.k)
    if merged:
        y, z = rows @ kernels.nf4_merged(q, a, bp, scale, x.dtype).mT, x.new_empty(0, a.shape[0])
    else:
        xa = rows if x_adapter is None else x_adapter.reshape(-1, q.k)
        factors = a.to(x.dtype), bp.to(x.dtype)
        if rows.shape[0] <= SKINNY_ROWS:
            y, z = kernels.nf4_skinny(rows, xa, q, *factors, scale)
        else:
            y, z = reference.two_paths(rows, xa, kernels.nf4_dequant(q, x.dtype), *factors, scale)
    return y.view(*x.shape[:-1], q.n), z


def backward(
    dy: Tensor,
    xa: Tensor,
    z: Tensor,
    q: QuantBundle,
    a: Tensor,
    bp: Tensor,
    scale: float,
    merged: bool,
    split: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`(dX, dX_adapter, dA, dB')`, each empty where `needs` says that nobody wants it. `xa (..., k)` is what the
    adapter saw, another tensor than the base's input where `split`; their gradients then stay apart.
    """
    kernels = dispatch.backend(xa)
    dtype = xa.dtype
    grad, rows = dy.reshape(-1, q.n).to(dtype), xa.reshape(-1, q.k)
    factor_a, factor_b = a.to(dtype), bp.to(dtype)
    need_x, need_xa, need_a, need_b = needs
    dx, dxa, da, db = xa.new_empty(0), xa.new_empty(0), a.new_empty(0), bp.new_empty(0)
    if need_a or (not merged and (need_x or need_xa)):
        dz = (grad @ factor_b).mul_(scale)
    if need_x:
        dx = grad @ (kernels.nf4_merged(q, a, bp, scale, dtype) if merged else kernels.nf4_dequant(q, dtype))
        if not merged and not split:
            dx.addmm_(dz, factor_a)
        dx = dx.view(xa.shape)
    if need_xa:
        dxa = (dz @ factor_a).view(xa.shape)
    if need_a:
        da = (dz.mT @ rows).to(a.dtype)
    if need_b:
        db = (grad.mT @ (rows @ factor_a.mT if merged else z)).mul_(scale).to(bp.dtype)
    return dx, dxa, da, db
