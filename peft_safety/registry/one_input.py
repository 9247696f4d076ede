"""Layers that get one input (q, k and v, or gate and up): with frozen factors `[A_q; A_k; A_v] x` is one product, and
in the backward pass one product gives what all three adapters add to the gradient of x.

The first layer that is called computes the product for all of them and leaves the others' parts at the input tensor,
where they live as long as it does. Each takes its part only if it is called with that very tensor, unchanged; so
layers of equal names with different inputs (q beside k and v in cross-attention) compute their own, as without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple
from weakref import ref

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from peft_safety import ops

TOGETHER = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("wq", "wk", "wv"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)
"""Names of layers under one parent whose inputs are the same as a rule."""
SKINNY_ROWS = 64
"""Up to so many rows of x, reading W dominates: 0.5 bytes per packed weight, 4.5 if it is dequantized first. Where
nothing learns, bitsandbytes reads packed weights there; so PEFT's path was 2.6 times as fast on an H200 as kernels of
ours that did so, too (one token, as a CUDA graph)."""
_LEFT = "_peft_safety_z"
_GROUP = "_one_input"


class _Group:
    """Layers of one model. They own it, so it holds them weakly; that of a copied or unpickled model holds the
    copies.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self._layers = [ref(layer) for layer in layers]

    def __iter__(self) -> Iterator[nn.Module]:
        return (layer for known in self._layers if (layer := known()) is not None)

    def __getstate__(self) -> list[nn.Module]:
        return list(self)

    __setstate__ = __init__


class _Part(NamedTuple):
    """The part of z that is left for a layer, what it was computed from, and whether with gradients."""

    z: Tensor
    weight: Tensor
    versions: tuple[int, int, int]
    graph: bool


def join(layers: Mapping[str, LoraLayer]) -> None:
    """Remember which of these layers have one input, by their names."""
    for name, layer in layers.items():
        parent, _, own = name.rpartition(".")
        for names in TOGETHER:
            if own in names:
                places = [f"{parent}.{other}" if parent else other for other in names]
                vars(layer)[_GROUP] = _Group(layers[place] for place in places if place in layers)


def siblings(layer: nn.Module) -> list[Any]:
    """The layers that have the input of this one, itself among them, in a fixed order."""
    found = list(vars(layer).get(_GROUP, ()))
    return found if any(one is layer for one in found) else [layer]


def skinny(x: Tensor) -> bool:
    """Whether `x (..., k)` has few rows."""
    return x.numel() // max(x.shape[-1], 1) <= SKINNY_ROWS


def z_of(layer: Any, adapter: str, x: Tensor, inputs: Tensor, takes: Callable[[Any], bool]) -> Tensor:
    """`inputs A^T (..., r)` of a layer's frozen A; `inputs` are the layer's own input `x` in the compute dtype.
    `takes` says of another layer with the same input whether its A can join the product.
    """
    own = layer.lora_A[adapter].weight
    # with few rows another layer may take PEFT's path; a compiler would have to trace what is left at a tensor
    if skinny(x) or torch.compiler.is_compiling() or type(x) is not Tensor or x.is_inference():
        return ops.lora_z(inputs, own.detach())
    part = vars(x).get(_LEFT, {}).pop(id(layer), None)
    if part is not None and part.weight is own and part[2:] == (_versions(x, own), torch.is_grad_enabled()):
        return part.z
    group = [one for one in siblings(layer) if one is layer or takes(one)]
    if len(group) == 1:
        return ops.lora_z(inputs, own.detach())
    factors = [one.lora_A[adapter].weight for one in group]
    together = ops.lora_z(inputs, torch.cat([factor.detach() for factor in factors]))
    parts = dict(zip(map(id, group), together.split([len(factor) for factor in factors], dim=-1), strict=True))
    grad = torch.is_grad_enabled()
    rest = {
        id(one): _Part(parts[id(one)], factor, _versions(x, factor), grad)
        for one, factor in zip(group, factors, strict=True)
        if one is not layer
    }
    setattr(x, _LEFT, rest)
    return parts[id(layer)]


def _versions(x: Tensor, weight: Tensor) -> tuple[int, int, int]:
    """What changes when either is written; a hot swap gives a weight other data without counting that as a write."""
    return x._version, weight._version, weight.data_ptr()
