"""The operations as torch knows them: schemas, shapes, and which function runs. Namespace `peft_safety`, plain tensors
only.

A `QuantBundle` is nine arguments in its own order (`*bundle`), so that compilers and other runtimes see tensors.
Derivatives are in `autograd.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from peft_safety.core import projection
from peft_safety.ops import dispatch, linear
from peft_safety.ops.quant import QuantBundle

_BUNDLE = (
    "Tensor wq, Tensor absmax, Tensor? absmax2, Tensor? code2, Tensor? offset, int n, int k, int "
    "blocksize, int blocksize2"
)
_Q = len(QuantBundle._fields)
SCHEMAS = {
    "nf4_dequant": f"({_BUNDLE}, ScalarType dtype) -> Tensor",
    "nf4_merged": f"({_BUNDLE}, Tensor a, Tensor bp, float scale, ScalarType dtype) -> Tensor",
    "nf4_lora": f"(Tensor x, Tensor? x_adapter, {_BUNDLE}, Tensor a, Tensor bp, float scale, bool merged)"
    " -> (Tensor, Tensor)",
    "nf4_lora_backward": f"(Tensor dy, Tensor xa, Tensor z, {_BUNDLE}, Tensor a, Tensor bp, float scale, bool merged, "
    "bool split, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)",
    "project_out": "(Tensor u, Tensor w, bool left) -> Tensor",
}


def _operation(name: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function, for all devices, with what it returns for tensors without data."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def without_autocast(*args: Any) -> Any:
            device = next(arg for arg in args if isinstance(arg, Tensor)).device.type
            if not torch.is_autocast_enabled(device):
                return function(*args)
            with torch.autocast(device, enabled=False):  # it would turn fp32 products inside into 16-bit ones
                return function(*args)

        torch.library.define(f"peft_safety::{name}", SCHEMAS[name])
        torch.library.impl(f"peft_safety::{name}", "CompositeExplicitAutograd", without_autocast)
        torch.library.register_fake(f"peft_safety::{name}", fake)
        return function

    return register


def _weight_like(*args: Any) -> Tensor:
    q = QuantBundle(*args[:_Q])
    return q.wq.new_empty(q.n, q.k, dtype=args[-1])


def _lora_like(x: Tensor, x_adapter: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    q, (a, _, _, merged) = QuantBundle(*rest[:_Q]), rest[_Q:]
    rows = x.numel() // q.k
    return x.new_empty(*x.shape[:-1], q.n), x.new_empty(0 if merged else rows, a.shape[0])


def _gradients_like(dy: Tensor, xa: Tensor, z: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a, bp, _, _, _, needs = rest[_Q:]
    return linear.empty_gradients(xa, a, bp, needs)


@_operation("nf4_dequant", _weight_like)
def _nf4_dequant(*args: Any) -> Tensor:
    q, dtype = QuantBundle(*args[:_Q]), args[_Q]
    return dispatch.backend(q.wq).nf4_dequant(q, dtype)


@_operation("nf4_merged", _weight_like)
def _nf4_merged(*args: Any) -> Tensor:
    q = QuantBundle(*args[:_Q])
    return dispatch.backend(q.wq).nf4_merged(q, *args[_Q:])


@_operation("nf4_lora", _lora_like)
def _nf4_lora(x: Tensor, x_adapter: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    return linear.forward(x, x_adapter, QuantBundle(*rest[:_Q]), *rest[_Q:])


@_operation("nf4_lora_backward", _gradients_like)
def _nf4_lora_backward(dy: Tensor, xa: Tensor, z: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return linear.backward(dy, xa, z, QuantBundle(*rest[:_Q]), *rest[_Q:])


@_operation("project_out", lambda u, w, left: torch.empty_like(w, memory_format=torch.contiguous_format))
def _project_out(u: Tensor, w: Tensor, left: bool) -> Tensor:
    return projection.project_wide(u, w, "out" if left else "in").contiguous()
