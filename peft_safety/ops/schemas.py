"""The operations as torch knows them: schemas, shapes, the function that runs, and derivatives for activations and
factors. A `QuantBundle` is nine arguments in its own order, so that compilers see plain tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from peft_safety.core import projection
from peft_safety.ops import dispatch, linear
from peft_safety.ops.quant import QuantBundle

_OPS: Any = torch.ops.peft_safety
_BUNDLE = (
    "Tensor wq, Tensor absmax, Tensor? absmax2, Tensor? code2, Tensor? offset, int n, int k, int blocksize, "
    "int blocksize2"
)
_Q = len(QuantBundle._fields)
_NO_BUNDLE = (None,) * _Q
SCHEMAS = {
    "nf4_dequant": f"({_BUNDLE}, ScalarType dtype) -> Tensor",
    "nf4_merged": f"({_BUNDLE}, Tensor a, Tensor bp, float scale, ScalarType dtype) -> Tensor",
    "nf4_lora": f"(Tensor x, Tensor? x_adapter, {_BUNDLE}, Tensor a, Tensor bp, float scale, bool merged)"
    " -> (Tensor, Tensor)",
    "nf4_lora_backward": f"(Tensor dy, Tensor xa, Tensor z, {_BUNDLE}, Tensor a, Tensor bp, float scale, bool merged, "
    "bool split, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)",
    "project_out": "(Tensor u, Tensor w, bool left) -> Tensor",
}


def _register(name: str, function: Callable[..., Any], fake: Callable[..., Any], bundle: int | None = 0) -> None:
    """Register a function and a fake one. Both take a `QuantBundle` for the nine arguments from place `bundle` on."""

    def packed(args: tuple[Any, ...]) -> tuple[Any, ...]:
        if bundle is None:
            return args
        return (*args[:bundle], QuantBundle(*args[bundle : bundle + _Q]), *args[bundle + _Q :])

    def without_autocast(*args: Any) -> Any:
        device = next(arg for arg in args if isinstance(arg, Tensor)).device.type
        if not torch.is_autocast_enabled(device):
            return function(*packed(args))
        with torch.autocast(device, enabled=False):  # it would turn fp32 products inside into 16-bit ones
            return function(*packed(args))

    torch.library.define(f"peft_safety::{name}", SCHEMAS[name])
    torch.library.impl(f"peft_safety::{name}", "CompositeExplicitAutograd", without_autocast)
    torch.library.register_fake(f"peft_safety::{name}", lambda *args: fake(*packed(args)))


def _weight_like(q: QuantBundle, *args: Any) -> Tensor:
    return q.wq.new_empty(q.n, q.k, dtype=args[-1])


def _merged_keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, bp, ctx.scale, _ = inputs[_Q:]
    ctx.save_for_backward(a, bp)


def _merged_gradients(ctx: Any, dw: Tensor) -> tuple[Tensor | None, ...]:
    a, bp = ctx.saved_tensors
    da = ((bp.to(dw.dtype).mT @ dw) * ctx.scale).to(a.dtype)
    db = ((dw @ a.to(dw.dtype).mT) * ctx.scale).to(bp.dtype)
    return (*_NO_BUNDLE, da, db, None, None)


def _lora_like(
    x: Tensor, x_adapter: Tensor | None, q: QuantBundle, a: Tensor, bp: Tensor, scale: float, merged: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(*x.shape[:-1], q.n), x.new_empty(0 if merged else x.numel() // q.k, a.shape[0])


def _lora_keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
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


def _gradients_like(dy: Tensor, xa: Tensor, z: Tensor, q: QuantBundle, *args: Any) -> tuple[Tensor, ...]:
    a, bp, _, _, _, needs = args
    return tuple(t.new_empty(t.shape if need else (0,)) for t, need in zip((xa, xa, a, bp), needs, strict=True))


def _project(u: Tensor, w: Tensor, left: bool) -> Tensor:
    return projection.project_wide(u, w, "out" if left else "in").contiguous()


def _project_keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    u, _, ctx.left = inputs
    ctx.save_for_backward(u)


def _project_gradient(ctx: Any, dw: Tensor) -> tuple[Tensor | None, ...]:
    return (None, _OPS.project_out(*ctx.saved_tensors, dw, ctx.left), None)  # I - U U^T is its own adjoint


_register("nf4_dequant", lambda q, dtype: dispatch.backend(q.wq).nf4_dequant(q, dtype), _weight_like)
_register("nf4_merged", lambda q, *args: dispatch.backend(q.wq).nf4_merged(q, *args), _weight_like)
_register("nf4_lora", linear.forward, _lora_like, bundle=2)
_register("nf4_lora_backward", linear.backward, _gradients_like, bundle=3)
_register("project_out", _project, lambda u, w, left: w.new_empty(w.shape), bundle=None)
torch.library.register_autograd("peft_safety::nf4_merged", _merged_gradients, setup_context=_merged_keep)
torch.library.register_autograd("peft_safety::nf4_lora", _lora_gradients, setup_context=_lora_keep)
torch.library.register_autograd("peft_safety::project_out", _project_gradient, setup_context=_project_keep)
