"""The fused path of a protected adapter on NF4 weights: `ops.lora_z` and `ops.nf4_lora` instead of PEFT's base
product, adapter product and sum. `fused=True` in the config turns it on, or `PEFT_SAFETY_FUSED=1`. Other layers run as
PEFT wrote them; `explain_dispatch` says why. So do calls with few rows in which nothing learns (`SKINNY_ROWS`).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from peft_safety import ops
from peft_safety.core import base_weights as weights
from peft_safety.core.names import walk
from peft_safety.core.scales import LIBRARIES
from peft_safety.layers import FrozenLinear, ProtectedLinear, joined
from peft_safety.layers.adapters import peft_kind
from peft_safety.ops.dispatch import VARIABLE
from peft_safety.registry import one_input

SWITCH = "PEFT_SAFETY_FUSED"
COMPUTE = (torch.float32, torch.bfloat16, torch.float16)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Plan(NamedTuple):
    """What a layer's fused path works with."""

    adapter: str
    weight: ops.QuantBundle
    backend: str
    reason: str


def opt(layers: Mapping[str, LoraLayer], adapter_name: str, wanted: bool | None) -> None:
    """Note in the layers of an adapter whether its config wants the fused path; None leaves it to `SWITCH`."""
    for layer in layers.values():
        known = vars(layer).get("_fused", {})
        vars(layer)["_fused"] = {**known, adapter_name: wanted}
    one_input.join(layers)


def forward(layer: Any, x: Tensor) -> Tensor | None:
    """What `lora.Linear4bit` returns for `x (..., in)`; None where PEFT's own path must run. Base and adapter are two
    products: `W + dW` rounded to 16 bits would lose a small update.
    """
    if not isinstance(x, Tensor) or (not _learns(layer, x) and one_input.skinny(x)):
        return None
    route = plan(layer)
    if isinstance(route, str):
        return None
    base = layer.get_base_layer()
    dtype = base.compute_dtype or x.dtype
    if dtype not in COMPUTE or not x.dtype.is_floating_point:
        return None
    if x.device != route.weight.wq.device:
        return None
    leaf_a, leaf_b = layer.lora_A[route.adapter], layer.lora_B[route.adapter]
    inputs, dropout = x.to(dtype), layer.lora_dropout[route.adapter]
    if drops(dropout):
        a, b = factors(leaf_a, leaf_b, x)
        z = ops.lora_z(dropout(inputs), a)
    elif isinstance(leaf_a, FrozenLinear):
        b = factors(leaf_a, leaf_b, x)[1]
        z = one_input.z_of(layer, route.adapter, x, inputs, lambda other: _same_a(other, layer, route.adapter))
    else:
        a, b = factors(leaf_a, leaf_b, x)
        z = ops.lora_z(inputs, a)
    y = ops.nf4_lora(inputs, route.weight, z, b, layer.scaling[route.adapter])
    if base.bias is not None:
        y = y + base.bias.to(dtype)
    return y.to(x.dtype)


def _learns(layer: Any, x: Tensor) -> bool:
    """Whether x or an active factor takes a gradient."""
    if not torch.is_grad_enabled():
        return False
    leaves = (table[name] for table in (layer.lora_A, layer.lora_B) for name in layer.active_adapters if name in table)
    return x.requires_grad or any(factor.requires_grad for leaf in leaves for factor in leaf.parameters())


def factors(leaf_a: nn.Module, leaf_b: nn.Module, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`(A' (r', in), B' (out, r'))` with `B' A' = dW / s`, differentiable: projected, and with a residual joined. A
    frozen A takes no gradient.
    """
    (a, a0), (b, b0) = (_factors(leaf, x) for leaf in (leaf_a, leaf_b))
    return joined(a, b, a0, b0)


def _factors(leaf: Any, x: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if isinstance(leaf, ProtectedLinear):
        return leaf.factors(x)
    weight: Tensor = leaf.weight
    return (weight.detach() if isinstance(leaf, FrozenLinear) else weight), None


def _same_a(other: Any, layer: Any, adapter: str) -> bool:
    """Whether another layer has a frozen A of this adapter like that of `layer`, in use. It makes its own plan when it
    is called; if that is not the fused path, nobody takes its part of z.
    """
    if adapter not in other.lora_A or adapter not in other.active_adapters or other.disable_adapters or other.merged:
        return False
    leaf, own = other.lora_A[adapter], layer.lora_A[adapter].weight
    if not isinstance(leaf, FrozenLinear) or drops(other.lora_dropout[adapter]):
        return False
    if getattr(other.get_base_layer(), "compute_dtype", None) != layer.get_base_layer().compute_dtype:
        return False
    weight = leaf.weight
    return (weight.dtype, weight.device, weight.shape[1:]) == (own.dtype, own.device, own.shape[1:])


def drops(dropout: nn.Module) -> bool:
    return isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0


def asked(layer: Any, adapters: Iterable[str]) -> bool:
    """Whether the config of an active adapter, or else the environment, turns the fused path on."""
    wanted = [value for name in adapters if (value := vars(layer).get("_fused", {}).get(name)) is not None]
    return all(wanted) if wanted else os.environ.get(SWITCH) == "1"


def plan(layer: Any) -> Plan | str:
    """What a layer's fused path works with, or why it takes another."""
    active: list[str] = [name for name in layer.active_adapters if name in layer.lora_A]
    if not asked(layer, active):
        return f"the fused path is off; fused=True in the config, or {SWITCH}=1, turns it on"
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
    if len(active) != 1:
        return f"{len(active)} active adapters"
    (adapter,) = active
    if (unusual := _unusual(layer, adapter, base)) is not None:
        return unusual
    q = ops.from_linear4bit(base)
    return q if isinstance(q, str) else Plan(adapter, q, name, reason)


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
        if type(leaf) not in (nn.Linear, ProtectedLinear, FrozenLinear):
            return f"a {type(leaf).__name__} in place of a factor"
        factor = leaf.raw() if isinstance(leaf, ProtectedLinear) else leaf.weight
        if hasattr(factor, "device_mesh") or factor.is_meta or factor.device != base.weight.device:
            return "factors that are sharded, or not on the device of the weight"
    if not any(isinstance(leaf, (ProtectedLinear, FrozenLinear)) for leaf in (leaf_a, leaf_b)):
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


def explain_dispatch(model: nn.Module) -> list[Route]:
    """Which path each LoRA layer of a model takes in its present state (mode, active adapters, device, environment),
    and why. A call with `adapter_names`, or with an input on another device, always takes PEFT's path. So does one
    with at most 64 rows (tokens of the batch) in which nothing learns, as when a model generates.

    Args:
        model: any module; without LoRA layers, plain or protected, the list is empty.

    Returns:
        A `Route` for each layer: its module, its path, and the reason.
    """
    routes = []
    for name, _, layer in walk(model):
        if isinstance(layer, LoraLayer):
            route = plan(layer)
            taken = ("peft", route) if isinstance(route, str) else (f"fused:{route.backend}", route.reason)
            routes.append(Route(name, *taken))
    return routes


def summary(routes: Iterable[Route]) -> list[dict[str, Any]]:
    """Rows of `kind` (the last part of the names), `path`, `reason` and `modules` (how many)."""
    groups = Counter((route.module.rpartition(".")[2], route.path, route.reason) for route in routes)
    return [{"kind": kind, "path": path, "reason": why, "modules": n} for (kind, path, why), n in groups.items()]
