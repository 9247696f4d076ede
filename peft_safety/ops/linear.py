"""A linear layer on an NF4 weight with an adapter, forward and backward, from a backend's kernels and dense products.

With `z = x A^T`, which `lora_z` computes and layers with one input share, `y = x W^T + s z B'^T`. So `dX = dY W`,
`dz = s dY B'` and `dB' = s dY^T z`: of x nothing is needed. W is never saved: the backward pass makes it again.

Base and adapter stay two products. A weight `W + s B' A` rounded to 16 bits has the rounding error of W, which is
large beside a small update. The base is in the dtype of x, the adapter in that of its factors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peft_safety.ops import dispatch
from peft_safety.ops.quant import QuantBundle


def rank_product(x: Tensor, a: Tensor) -> Tensor:
    """`z = x A^T (..., r)`, in the wider dtype of x and A."""
    rows = x.reshape(-1, x.shape[-1])
    z: Tensor = dispatch.backend(x).lora_z(rows, a)
    return z.view(*x.shape[:-1], a.shape[0])


def forward(x: Tensor, q: QuantBundle, z: Tensor, bp: Tensor, scale: float) -> Tensor:
    """`y (..., n)` in the dtype of `x (..., k)`, from `z (..., r)` and `B' (n, r)`."""
    wide = torch.promote_types(z.dtype, bp.dtype)
    adapter = (z.reshape(-1, z.shape[-1]).to(wide) @ bp.to(wide).mT).mul_(scale).to(x.dtype)
    # a base rounded before the sum would swallow an update below half its spacing
    y: Tensor = adapter.addmm_(x.reshape(-1, q.k), dispatch.backend(x).nf4_dequant(q, x.dtype).mT)
    return y.view(*x.shape[:-1], q.n)


def backward(
    dy: Tensor, q: QuantBundle, z: Tensor, bp: Tensor, scale: float, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """`(dX, dz, dB')`, each empty where `needs` says that nobody wants it."""
    grad = dy.reshape(-1, q.n)
    wide = torch.promote_types(torch.promote_types(z.dtype, bp.dtype), dy.dtype)
    need_x, need_z, need_b = needs
    dx, dz, db = dy.new_empty(0), z.new_empty(0), bp.new_empty(0)
    if need_x:
        dx = (grad @ dispatch.backend(dy).nf4_dequant(q, dy.dtype)).view(*dy.shape[:-1], q.k)
    wide_grad = grad.to(wide) if need_z or need_b else grad
    if need_z:
        dz = (wide_grad @ bp.to(wide)).mul_(scale).to(z.dtype).view(*dy.shape[:-1], bp.shape[1])
    if need_b:
        db = (wide_grad.mT @ z.reshape(-1, z.shape[-1]).to(wide)).mul_(scale).to(bp.dtype)
    return dx, dz, db
