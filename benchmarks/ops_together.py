"""Layers with one input (q, k and v; gate and up) under frozen factors: one after another with a common product z, as
the fused path computes them, or all in one autograd function. What would such a function save?

Each weight is dequantized once and multiplied once, either way. The function sums what the layers add to the gradient
of x in the products themselves, and keeps the factors apart for its backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.ops_arms import SCALE, Layer, layer
from peft_safety import ops

ARMS = ("one by one", "one function")


class _OneFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: Sequence[Layer], *factors: Tensor) -> tuple[Tensor, ...]:
        z = x @ torch.cat([one.a.detach() for one in layers]).mT
        parts = z.split([len(one.a) for one in layers], dim=1)
        ctx.save_for_backward(z, *factors)
        ctx.layers = layers
        return tuple(
            (part @ b.mT).mul_(SCALE).addmm_(x, ops.nf4_dequant(one.q, x.dtype).mT)
            for one, part, b in zip(layers, parts, factors, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z, *factors = ctx.saved_tensors
        parts = z.split([len(one.a) for one in ctx.layers], dim=1)
        dz = torch.cat([(dy @ b).mul_(SCALE) for dy, b in zip(grads, factors, strict=True)], dim=1)
        dx = dz @ torch.cat([one.a.detach() for one in ctx.layers])
        for dy, one in zip(grads, ctx.layers, strict=True):
            dx.addmm_(dy, ops.nf4_dequant(one.q, dy.dtype))
        return dx, None, *((dy.mT @ part).mul_(SCALE) for dy, part in zip(grads, parts, strict=True))


def one_by_one(x: Tensor, layers: Sequence[Layer]) -> tuple[Tensor, ...]:
    z = ops.lora_z(x, torch.cat([one.a.detach() for one in layers]))
    parts = z.split([len(one.a) for one in layers], dim=1)
    return tuple(ops.nf4_lora(x, one.q, part, one.b, SCALE) for one, part in zip(layers, parts, strict=True))


def one_function(x: Tensor, layers: Sequence[Layer]) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = _OneFunction.apply(x, layers, *(one.b for one in layers))
    return found


def works(
    heights: Sequence[int], k: int, tokens: int, device: str, dtype: torch.dtype
) -> dict[str, Callable[[], list[Tensor]]]:
    """Forward and backward of both ways, for layers of these heights on `x (tokens, k)`: the outputs, the gradient of
    x, and those of the factors.
    """
    layers = [layer(n, k, device, dtype, index) for index, n in enumerate(heights)]
    x = torch.randn(tokens, k, device=device, dtype=dtype, requires_grad=True)
    grads = [torch.randn(tokens, n, device=device, dtype=dtype) for n in heights]

    def both(forward: Callable[[Tensor, Sequence[Layer]], tuple[Tensor, ...]]) -> list[Tensor]:
        outputs = forward(x, layers)
        return [*outputs, *torch.autograd.grad(outputs, [x, *(one.b for one in layers)], grads)]

    return dict(zip(ARMS, (lambda: both(one_by_one), lambda: both(one_function)), strict=True))
