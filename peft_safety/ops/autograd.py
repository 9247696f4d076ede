"""Derivatives of the operations: for activations and factors, never for quantized weights or bases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peft_safety.ops import schemas

_Q = schemas._Q
_OPS = torch.ops.peft_safety
_NO_BUNDLE = (None,) * _Q


def _keep_lora(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, x_adapter, *rest = inputs
    bundle, (a, bp, ctx.scale, ctx.merged) = rest[:_Q], rest[_Q:]
    ctx.sizes, ctx.split = tuple(bundle[5:]), x_adapter is not None
    ctx.save_for_backward(x if x_adapter is None else x_adapter, output[1], *bundle[:5], a, bp)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _lora_gradients(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * (2 + _Q + 4)
    xa, z, *bundle, a, bp = ctx.saved_tensors
    needs = [bool(ctx.needs_input_grad[place]) for place in (0, 1, 2 + _Q, 3 + _Q)]
    gradients = _OPS.nf4_lora_backward(dy, xa, z, *bundle, *ctx.sizes, a, bp, ctx.scale, ctx.merged, ctx.split, needs)
    dx, dxa, da, db = (value if need else None for value, need in zip(gradients, needs, strict=True))
    return (dx, dxa, *_NO_BUNDLE, da, db, None, None)


def _keep_merged(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, bp, ctx.scale, _ = inputs[_Q:]
    ctx.save_for_backward(a, bp)


def _merged_gradients(ctx: Any, dw: Tensor) -> tuple[Tensor | None, ...]:
    a, bp = ctx.saved_tensors
    da = ((bp.to(dw.dtype).mT @ dw) * ctx.scale).to(a.dtype)
    db = ((dw @ a.to(dw.dtype).mT) * ctx.scale).to(bp.dtype)
    return (*_NO_BUNDLE, da, db, None, None)


def _keep_basis(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.left = inputs[2]


def _projected_gradient(ctx: Any, dw: Tensor) -> tuple[Tensor | None, ...]:
    (u,) = ctx.saved_tensors
    return (None, _OPS.project_out(u, dw, ctx.left), None)  # I - U U^T is its own adjoint


torch.library.register_autograd("peft_safety::nf4_lora", _lora_gradients, setup_context=_keep_lora)
torch.library.register_autograd("peft_safety::nf4_merged", _merged_gradients, setup_context=_keep_merged)
torch.library.register_autograd("peft_safety::project_out", _projected_gradient, setup_context=_keep_basis)
