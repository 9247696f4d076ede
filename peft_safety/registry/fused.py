"""The fused path of a protected adapter on NF4 weights: `ops.nf4_lora` in place of PEFT's base product, adapter
product and sum, where a layer is eligible.

`PEFT_SAFETY_FUSED=1` turns it on. It is then taken on GPUs that Triton serves, and wherever `PEFT_SAFETY_BACKEND`
names a backend. Plain LoRA, and whatever else is not eligible, runs as PEFT wrote it, and `explain` says why.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from peft_safety import ops
from peft_safety.core import base_weights as weights
from peft_safety.core.names import walk
from peft_safety.layers import ProtectedLinear, joined
from peft_safety.layers.adapters import peft_kind
from peft_safety.ops.dispatch import VARIABLE

SWITCH = "PEFT_SAFETY_FUSED"
COMPUTE = (torch.float32, torch.bfloat16, torch.float16)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def forward(layer: Any, x: Tensor) -> Tensor | None:
    """What `lora.Linear4bit` computes for `x (..., in)` with its active adapter, `(..., out)` in the dtype of `x`;
    None where PEFT's own path must run.

    In training, more than a few rows take one product with `W + dW` rounded to the compute dtype. In eval mode base
    and adapter are two paths, so that a
    small update is not lost in that rounding: what is served is `C B A x` to the precision of the factors.
    """
    found = plan(layer)
    if isinstance(found, str):
        return None
    adapter, q, _ = found
    base = layer.get_base_layer()
    dtype = base.compute_dtype or x.dtype
    if not isinstance(x, Tensor) or dtype not in COMPUTE or not x.dtype.is_floating_point or x.device != q.wq.device:
        return None
    a, b = factors(layer.lora_A[adapter], layer.lora_B[adapter], x)
    inputs, dropout = x.to(dtype), layer.lora_dropout[adapter]
    dropped = dropout(inputs) if drops(dropout) else None
    y = ops.nf4_lora(inputs, q, a, b, layer.scaling[adapter], exact=not layer.training, x_adapter=dropped)
    if base.bias is not None:
        y = y + base.bias.to(dtype)
    return y.to(x.dtype)


def factors(leaf_a: nn.Module, leaf_b: nn.Module, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`(A' (r', in), B' (out, r'))` with `B' A' = dW / s`, differentiable: projected, and with a residual `[A; A0]`
    and `[B, -B0]`.
    """
    (a, a0), (b, b0) = (
        leaf.factors(x) if isinstance(leaf, ProtectedLinear) else (leaf.weight, None) for leaf in (leaf_a, leaf_b)
    )
    return joined(a, b, a0, b0)  # type: ignore[arg-type]


def drops(dropout: nn.Module) -> bool:
    """Whether a dropout module does anything now."""
    return isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0


def plan(layer: Any) -> tuple[str, ops.QuantBundle, str] | str:
    """The adapter, the weight and the backend (with its reason) of the fused path, or why this layer does not take it
    now.

    Args:
        layer: any of PEFT's LoRA layers.
    """
    if os.environ.get(SWITCH) != "1":
        return f"the fused path is off; {SWITCH}=1 turns it on"
    base = layer.get_base_layer()
    kind = weights.quantization(base)
    if kind != "4bit":
        return {"8bit": "an 8-bit base weight", "fp8": "an FP8 base weight"}.get(
            kind or "", "a dense base weight: there is nothing to dequantize"
        )
    if peft_kind(layer).__name__ != "Linear4bit":
        return f"a {peft_kind(layer).__name__} around a 4-bit weight (PEFT did not know that the model is quantized)"
    name, reason = ops.backend_for(base.weight)
    if name == "reference" and os.environ.get(VARIABLE, "") != "reference":
        return reason
    adapter = _adapter(layer)
    if adapter not in layer.lora_A:
        return adapter
    unusual = _unusual(layer, adapter, base)
    if unusual is not None:
        return unusual
    q = ops.from_linear4bit(base)
    return q if isinstance(q, str) else (adapter, q, f"{name}: {reason}")


def _adapter(layer: Any) -> str:
    """The one adapter that is active here, or why there is none."""
    if layer.disable_adapters:
        return "adapters are disabled"
    if layer.merged:
        return "an adapter is merged into the weight"
    active: list[str] = [name for name in layer.active_adapters if name in layer.lora_A]
    return active[0] if len(active) == 1 else f"{len(active)} active adapters"


def _unusual(layer: Any, adapter: str, base: nn.Module) -> str | None:
    """What PEFT's path would do and the fused one would not."""
    if adapter in layer.lora_variant:
        return f"a LoRA variant ({type(layer.lora_variant[adapter]).__name__})"
    if layer.lora_bias[adapter]:
        return "lora_bias"
    if isinstance(layer.scaling[adapter], Tensor):
        return "a scaling held in a tensor (prepared for compiled hot-swapping)"
    leaf_a, leaf_b, dropout = layer.lora_A[adapter], layer.lora_B[adapter], layer.lora_dropout[adapter]
    if not isinstance(dropout, (nn.Dropout, nn.Identity)):
        return f"a {type(dropout).__name__} in place of dropout"
    for leaf in (leaf_a, leaf_b):
        if type(leaf) not in (nn.Linear, ProtectedLinear):
            return f"a {type(leaf).__name__} in place of a factor"
        factor = leaf.raw() if isinstance(leaf, ProtectedLinear) else leaf.weight
        if hasattr(factor, "device_mesh") or factor.is_meta or factor.device != base.weight.device:
            return "factors that are sharded, or not on the device of the weight"
    if not any(isinstance(leaf, ProtectedLinear) for leaf in (leaf_a, leaf_b)):
        return "a plain LoRA adapter: the fused path is for protected ones"
    for module in (base, leaf_a, leaf_b, dropout):
        if "forward" in vars(module) or any(getattr(module, hooks) for hooks in _HOOKS):
            return f"hooks on its {type(module).__name__}"
    return None


class Route(NamedTuple):
    """Which path a layer takes now.

    Attributes:
        module: its name.
        path: "fused:triton", "fused:reference" or "peft".
        reason: why the fused path is taken, or is not.
    """

    module: str
    path: str
    reason: str


def explain(model: nn.Module) -> list[Route]:
    """Which path each LoRA layer of a model takes in its present state (mode, active adapters, device, environment),
    and why. A call with `adapter_names`, or with an input of another device, takes PEFT's path whatever this says.

    Args:
        model: any module with LoRA layers in it, protected or plain; without any, the list is empty.
    """
    routes = []
    for name, _, layer in walk(model):
        if isinstance(layer, LoraLayer):
            found = plan(layer)
            path, reason = (
                ("peft", found)
                if isinstance(found, str)
                else (f"fused:{found[2].partition(':')[0]}", found[2].partition(": ")[2])
            )
            routes.append(Route(name, path, reason))
    return routes


def summary(routes: Iterable[Route]) -> list[dict[str, Any]]:
    """Rows of `kind` (the last part of the names), `path`, `reason` and `modules` (how many)."""
    found = Counter((route.module.rpartition(".")[2], route.path, route.reason) for route in routes)
    return [
        {"kind": kind, "path": path, "reason": reason, "modules": count}
        for (kind, path, reason), count in found.items()
    ]
