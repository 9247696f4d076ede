"""The operations as torch knows them: schemas, shapes, and which function runs. Namespace `peft_safety`, plain tensors only.

A `QuantBundle` is nine arguments in its own order (`*bundle`), so that compilers and other runtimes see tensors. Derivatives are in `autograd.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from peft_safety import projection
from peft_safety.ops import dispatch, linear, streaming
from peft_safety.ops.quant import QuantBundle


def _bundle(suffix: str = "") -> str:
    tensors = ("Tensor wq", "Tensor absmax", "Tensor? absmax2", "Tensor? code2", "Tensor? offset")
    return ", ".join(name + suffix for name in (*tensors, "int n", "int k", "int blocksize", "int blocksize2"))


_Q = len(QuantBundle._fields)
SCHEMAS = {
    "nf4_dequant": f"({_bundle()}, ScalarType dtype) -> Tensor",
    "nf4_merged": f"({_bundle()}, Tensor a, Tensor bp, float scale, ScalarType dtype) -> Tensor",
    "nf4_lora": f"(Tensor x, Tensor? x_adapter, {_bundle()}, Tensor a, Tensor bp, float scale, bool merged) -> (Tensor, Tensor)",
    "nf4_lora_backward": f"(Tensor dy, Tensor xa, Tensor z, {_bundle()}, Tensor a, Tensor bp, float scale, bool merged, bool split, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    "nf4_mul": f"({_bundle()}, Tensor z) -> Tensor",
    "nf4_tmul": f"({_bundle()}, Tensor b) -> Tensor",
    "nf4_diff_mul": f"({_bundle('_a')}, {_bundle('_b')}, Tensor z) -> Tensor",
    "nf4_diff_tmul": f"({_bundle('_a')}, {_bundle('_b')}, Tensor b) -> (Tensor, Tensor)",
    "diff_mul": "(Tensor wa, Tensor wb, Tensor z) -> Tensor",
    "diff_tmul": "(Tensor wa, Tensor wb, Tensor b) -> (Tensor, Tensor)",
    "project_out": "(Tensor u, Tensor w, bool left) -> Tensor",
    "project_out_grouped": "(Tensor u, Tensor w) -> Tensor",
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


def _working_like(t: Tensor, rows: int) -> Tensor:
    return t.new_empty(rows, t.shape[1], dtype=torch.float64 if t.dtype == torch.float64 else torch.float32)


def _energy_like(t: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    return _working_like(t, rows), t.new_empty((), dtype=torch.float64)


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


@_operation("nf4_mul", lambda *args: _working_like(args[-1], args[5]))
def _nf4_mul(*args: Any) -> Tensor:
    q = QuantBundle(*args[:_Q])
    return streaming.mul(streaming.of_nf4(q), q.n, q.k, args[_Q].float())


@_operation("nf4_tmul", lambda *args: _working_like(args[-1], args[6]))
def _nf4_tmul(*args: Any) -> Tensor:
    q = QuantBundle(*args[:_Q])
    return streaming.tmul(streaming.of_nf4(q), q.n, q.k, args[_Q].float())[0]


@_operation("nf4_diff_mul", lambda *args: _working_like(args[-1], args[5]))
def _nf4_diff_mul(*args: Any) -> Tensor:
    qa, qb = QuantBundle(*args[:_Q]), QuantBundle(*args[_Q : 2 * _Q])
    return streaming.mul(streaming.of_nf4_difference(qa, qb), qa.n, qa.k, args[-1].float())


@_operation("nf4_diff_tmul", lambda *args: _energy_like(args[-1], args[6]))
def _nf4_diff_tmul(*args: Any) -> tuple[Tensor, Tensor]:
    qa, qb = QuantBundle(*args[:_Q]), QuantBundle(*args[_Q : 2 * _Q])
    return streaming.tmul(streaming.of_nf4_difference(qa, qb), qa.n, qa.k, args[-1].float())


@_operation("diff_mul", lambda wa, wb, z: _working_like(z, wa.shape[0]))
def _diff_mul(wa: Tensor, wb: Tensor, z: Tensor) -> Tensor:
    return streaming.mul(streaming.of_difference(wa, wb), wa.shape[0], wa.shape[1], z)


@_operation("diff_tmul", lambda wa, wb, b: _energy_like(b, wa.shape[1]))
def _diff_tmul(wa: Tensor, wb: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return streaming.tmul(streaming.of_difference(wa, wb), wa.shape[0], wa.shape[1], b)


@_operation("project_out", lambda u, w, left: torch.empty_like(w, memory_format=torch.contiguous_format))
def _project_out(u: Tensor, w: Tensor, left: bool) -> Tensor:
    found = projection.project_out(u, w.to(u.dtype), "out" if left else "in")
    return found.to(w.dtype).contiguous()


@_operation("project_out_grouped", lambda u, w: torch.empty_like(w, memory_format=torch.contiguous_format))
def _project_out_grouped(u: Tensor, w: Tensor) -> Tensor:
    factor = w.to(u.dtype)
    return torch.baddbmm(factor, u, u.mT @ factor, alpha=-1).to(w.dtype).contiguous()
