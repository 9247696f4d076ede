"""The fused path of a protected adapter on NF4 weights: `ops.nf4_lora` instead of PEFT's base product, adapter product
and sum. `PEFT_SAFETY_FUSED=1` turns it on. Other layers run as PEFT wrote them; `explain` says why.
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
from peft_safety.core.scales import LIBRARIES
from peft_safety.layers import ProtectedLinear, joined
from peft_safety.layers.adapters import peft_kind
from peft_safety.ops.dispatch import VARIABLE

SWITCH = "PEFT_SAFETY_FUSED"
COMPUTE = (torch.float32, torch.bfloat16, torch.float16)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def forward(layer: Any, x: Tensor) -> Tensor | None:
    """What `lora.Linear4bit` returns for `x (..., in)`; None where PEFT's own path must run. In eval mode base and
    adapter are two products, so that rounding `W + dW` to the compute dtype does not lose a small update.
    """
    route = plan(layer)
    if isinstance(route, str):
        return None
    adapter, q, _ = route
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
    """`(A' (r', in), B' (out, r'))` with `B' A' = dW / s`, differentiable: projected, and with a residual joined."""
    (a, a0), (b, b0) = (
        leaf.factors(x) if isinstance(leaf, ProtectedLinear) else (leaf.weight, None) for leaf in (leaf_a, leaf_b)
    )
    return joined(a, b, a0, b0)  # type: ignore[arg-type]


def drops(dropout: nn.Module) -> bool:
    return isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0


def plan(layer: Any) -> tuple[str, ops.QuantBundle, str] | str:
    """The adapter, the weight and the backend (with its reason) of a layer's fused path, or why it takes another."""
    if os.environ.get(SWITCH) != "1":
        return f"the fused path is off; {SWITCH}=1 turns it on"
    base = layer.get_base_layer()
    kind = weights.quantization(base)
    if kind != "4bit":
        known = {"8bit": "an 8-bit base weight", "fp8": "an FP8 base weight", "packed": "a packed base weight"}
        known |= {library: f"a base weight of {library}" for library in LIBRARIES}
        return known.get(kind or "", "a dense base weight: there is nothing to dequantize")
    if peft_kind(layer).__name__ != "Linear4bit":
        return f"a {peft_kind(layer).__name__} around a 4-bit weight (PEFT did not know that the model is quantized)"
    name, reason = ops.backend_for(base.weight)
    if name == "reference" and os.environ.get(VARIABLE, "") != "reference":
        return reason
    if layer.disable_adapters:
        return "adapters are disabled"
    if layer.merged:
        return "an adapter is merged into the weight"
    active: list[str] = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) != 1:
        return f"{len(active)} active adapters"
    (adapter,) = active
    if (unusual := _unusual(layer, adapter, base)) is not None:
        return unusual
    q = ops.from_linear4bit(base)
    return q if isinstance(q, str) else (adapter, q, f"{name}: {reason}")


def _unusual(layer: Any, adapter: str, base: nn.Module) -> str | None:
    """What PEFT's path would compute and the fused one would not."""
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
    """Which path a layer takes now: "fused:triton", "fused:reference" or "peft", and why."""

    module: str
    path: str
    reason: str


def explain(model: nn.Module) -> list[Route]:
    """Which path each LoRA layer of a model takes in its present state (mode, active adapters, device, environment),
    and why. A call with `adapter_names`, or with an input on another device, always takes PEFT's path.

    Args:
        model: any module; without LoRA layers, plain or protected, the list is empty.
    """
    routes = []
    for name, _, layer in walk(model):
        if isinstance(layer, LoraLayer):
            route = plan(layer)
            backend, _, reason = ("peft", "", route) if isinstance(route, str) else route[2].partition(": ")
            routes.append(Route(name, backend if isinstance(route, str) else f"fused:{backend}", reason))
    return routes


def summary(routes: Iterable[Route]) -> list[dict[str, Any]]:
    """Rows of `kind` (the last part of the names), `path`, `reason` and `modules` (how many)."""
    groups = Counter((route.module.rpartition(".")[2], route.path, route.reason) for route in routes)
    return [{"kind": kind, "path": path, "reason": why, "modules": n} for (kind, path, why), n in groups.items()]
