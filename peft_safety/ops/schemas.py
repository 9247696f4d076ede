"""The operations as torch knows them: schemas, shapes, the function that runs, and derivatives for activations and
factors. A `QuantBundle` is nine arguments in its own order, so that compilers see plain tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from peft_safety.ops import linear
from peft_safety.ops.quant import QuantBundle

_OPS: Any = torch.ops.peft_safety
_BUNDLE = (
    "Tensor wq, Tensor absmax, Tensor? absmax2, Tensor? code2, Tensor? offset, int n, int k, int blocksize, "
    "int blocksize2"
)
_Q = len(QuantBundle._fields)
SCHEMAS = {
    "lora_z": "(Tensor x, Tensor a) -> Tensor",
    "nf4_lora": f"(Tensor x, {_BUNDLE}, Tensor z, Tensor bp, float scale) -> Tensor",
    "nf4_lora_backward": f"(Tensor dy, {_BUNDLE}, Tensor z, Tensor bp, float scale, bool[] needs)"
    " -> (Tensor, Tensor, Tensor)",
}


def _register(name: str, function: Callable[..., Any], fake: Callable[..., Any], *, bundle: bool = True) -> None:
    """Register a function and a fake one. With `bundle`, both take a `QuantBundle` for the nine arguments after the
    first.
    """

    def packed(args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0], QuantBundle(*args[1 : 1 + _Q]), *args[1 + _Q :]) if bundle else args

    def without_autocast(*args: Any) -> Any:
        device = args[0].device.type
        if not torch.is_autocast_enabled(device):
            return function(*packed(args))
        with torch.autocast(device, enabled=False):  # it would turn fp32 products inside into 16-bit ones
            return function(*packed(args))

    torch.library.define(f"peft_safety::{name}", SCHEMAS[name])
    torch.library.impl(f"peft_safety::{name}", "CompositeExplicitAutograd", without_autocast)
    torch.library.register_fake(f"peft_safety::{name}", lambda *args: fake(*packed(args)))


def _z_like(x: Tensor, a: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], a.shape[0], dtype=torch.promote_types(x.dtype, a.dtype))


def _z_keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """x only where A is trained: a frozen A needs nothing of it."""
    x, a = inputs
    need_x, need_a = ctx.needs_input_grad[:2]
    ctx.dtypes = x.dtype, a.dtype
    ctx.save_for_backward(x if need_a else None, a if need_x else None)


def _z_gradients(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
    x, a = ctx.saved_tensors
    x_dtype, a_dtype = ctx.dtypes
    with torch.autocast(dz.device.type, enabled=False):
        dx = None if a is None else (dz @ a.to(dz.dtype)).to(x_dtype)
        da = None if x is None else (dz.flatten(0, -2).mT @ x.flatten(0, -2).to(dz.dtype)).to(a_dtype)
    return dx, da


def _lora_like(x: Tensor, q: QuantBundle, *args: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], q.n)


def _lora_keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """z and the factor, never x or W."""
    _, *bundle = inputs[: 1 + _Q]
    z, bp, ctx.scale = inputs[1 + _Q :]
    ctx.sizes = tuple(bundle[5:])
    ctx.save_for_backward(*bundle[:5], z, bp)


def _lora_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    *bundle, z, bp = ctx.saved_tensors
    needs = [bool(ctx.needs_input_grad[place]) for place in (0, 1 + _Q, 2 + _Q)]
    gradients = _OPS.nf4_lora_backward(dy, *bundle, *ctx.sizes, z, bp, ctx.scale, needs)
    dx, dz, db = (value if need else None for value, need in zip(gradients, needs, strict=True))
    return (dx, *(None,) * _Q, dz, db, None)


def _gradients_like(
    dy: Tensor, q: QuantBundle, z: Tensor, bp: Tensor, scale: float, needs: list[bool]
) -> tuple[Tensor, ...]:
    dx = dy.new_empty((*dy.shape[:-1], q.k) if needs[0] else (0,))
    return (dx, *(t.new_empty(t.shape if need else (0,)) for t, need in zip((z, bp), needs[1:], strict=True)))


_register("lora_z", linear.rank_product, _z_like, bundle=False)
_register("nf4_lora", linear.forward, _lora_like)
_register("nf4_lora_backward", linear.backward, _gradients_like)
torch.library.register_autograd("peft_safety::lora_z", _z_gradients, setup_context=_z_keep)
torch.library.register_autograd("peft_safety::nf4_lora", _lora_gradients, setup_context=_lora_keep)
