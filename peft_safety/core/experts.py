"""Fused experts of a mixture: all experts' weights of one product are a single 3-D parameter of the layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def input_parameter(layer: nn.Module) -> str | None:
    """The name of the parameter that multiplies the inputs of fused experts, `(experts, out, in)`, or `(experts, in,
    out)` where the layer `is_transposed`; None for any other layer. transformers' `use_experts_implementation` says
    how a layer is built. The inputs of `down_proj` are computed inside the layer, where nobody can see them.
    """
    transposed, gate = (getattr(layer, name, None) for name in ("is_transposed", "has_gate"))
    name = "gate_up_proj" if gate else "up_proj"
    weight: Any = getattr(layer, name, None) if isinstance(transposed, bool) and isinstance(gate, bool) else None
    dense = isinstance(weight, Tensor) and weight.ndim == 3 and weight.dtype.is_floating_point and weight.itemsize > 1
    return name if dense else None


def stacked_weight(layer: nn.Module) -> Tensor | None:
    """That parameter."""
    name = input_parameter(layer)
    weight: Tensor | None = None if name is None else getattr(layer, name)
    return weight


def expert_shape(layer: nn.Module) -> tuple[int, int] | None:
    """`(out_features, in_features)` of one expert; None for a layer of another kind."""
    if (weight := stacked_weight(layer)) is None:
        return None
    m, n = weight.shape[1:]
    return (int(n), int(m)) if layer.is_transposed else (int(m), int(n))
