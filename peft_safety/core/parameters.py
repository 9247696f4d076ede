"""Adapters on single parameters: those of fused experts, plain matrices, and the projections of PyTorch's attention.

PEFT changes such a weight instead of a layer's output. Its modules are named as PEFT names their factors on disk: of
several parameters of one layer, the last one by the layer's own name, and those before it by `.base_layer` each.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from peft_safety.errors import UnsupportedLayerError

INNER = ".base_layer"
_PARTS = re.compile(rf"({re.escape(INNER)})+(\.out_proj)?$")
IN_PROJ, OUT_PROJ = "in_proj_weight", "out_proj.weight"


class ParameterOf(nn.Module):
    """A parameter where functions expect a base layer. `owner` is the layer whose forward multiplies by it; it is not
    registered, so that nothing is moved or listed twice.
    """

    owner: nn.Module
    parameter: str

    def __init__(self, owner: nn.Module, parameter: str) -> None:
        super().__init__()
        vars(self).update(owner=owner, parameter=parameter)

    @property
    def weight(self) -> Tensor:
        value: Tensor = attrgetter(self.parameter)(self.owner)
        return value

    @property
    def input_axis(self) -> int:
        """Which axis, from the end, PEFT takes for the inputs': that of `lora_A`."""
        return -2 if self.weight.ndim == 3 and getattr(self.owner, "is_transposed", False) else -1

    @property
    def shape(self) -> tuple[int, int]:
        """`(out_features, in_features)` of the matrix, or of one expert."""
        m, n = self.weight.shape[-2:]
        return (int(n), int(m)) if self.input_axis == -2 else (int(m), int(n))

    @property
    def is_attention(self) -> bool:
        return isinstance(self.owner, nn.MultiheadAttention)

    @property
    def is_input(self) -> bool:
        """Whether it multiplies what fused experts get."""
        return self.parameter == input_parameter(self.owner)

    @property
    def is_known(self) -> bool:
        """Whether the layer's kind says that PEFT has the inputs on the right side."""
        return self.is_attention or (self.weight.ndim == 3 and are_experts(self.owner))

    def extra_repr(self) -> str:
        return f"{self.parameter} {tuple(self.weight.shape)} of {type(self.owner).__name__}"


def are_experts(layer: nn.Module) -> bool:
    """Whether transformers' `use_experts_implementation` says how the fused parameters of a layer are stored."""
    return all(isinstance(getattr(layer, name, None), bool) for name in ("is_transposed", "has_gate"))


def input_parameter(layer: nn.Module) -> str | None:
    """The name of the parameter that multiplies the inputs of fused experts, `(experts, out, in)`, or `(experts, in,
    out)` where the layer `is_transposed`; None for any other layer.
    """
    if not are_experts(layer):
        return None
    name = "gate_up_proj" if layer.has_gate else "up_proj"
    return name if _is_dense(getattr(layer, name, None), (3,)) else None


def part_of(layer: nn.Module, parameter: str) -> nn.Module:
    """What stands for a parameter of a base layer: a linear layer for its own weight."""
    return layer if isinstance(layer, nn.Linear) and parameter == "weight" else ParameterOf(layer, parameter)


def parts_of(name: str, layer: nn.Module, parameters: Collection[str] = ()) -> dict[str, nn.Module]:
    """By PEFT's names, what adapters on parameters of a base layer change: those named, in PEFT's order, or both
    projections of `nn.MultiheadAttention`.
    """
    if isinstance(layer, nn.MultiheadAttention):
        if not layer._qkv_same_embed_dim:
            return {}
        out = {f"{name}{INNER}.out_proj": ParameterOf(layer, OUT_PROJ)}
        return {name: ParameterOf(layer, IN_PROJ), **out}
    own = [part for part, _ in layer.named_parameters(recurse=False) if part in parameters]
    return {name + INNER * depth: part_of(layer, part) for depth, part in enumerate(reversed(own))}


def targeted(layers: Iterable[tuple[str, nn.Module]], target_parameters: Iterable[str] | None) -> dict[str, nn.Module]:
    """The parameters that PEFT would match, as `parts_of` has them. `layers`: all modules of the base model."""
    ends = tuple(f".{name}" for name in target_parameters or ())
    result: dict[str, nn.Module] = {}
    for name, layer in layers if ends else ():
        wanted = [part for part, _ in layer.named_parameters(recurse=False) if f".{name}.{part}".endswith(ends)]
        if wanted and name:
            result |= parts_of(name, layer, wanted)
    return result


def place_of(name: str) -> str:
    """The name of the base layer behind one of PEFT's names."""
    return _PARTS.sub("", name)


def own_place(name: str) -> str:
    """The same, and of attention's output projection its own place in the base model."""
    return _PARTS.sub(r"\2", name)


def stored_name(name: str, parameter: str | None) -> str:
    """What a config names for one of PEFT's names: the parameter, or the layer."""
    place = place_of(name)
    return place if parameter is None else f"{place}.{parameter}"


def expert_shape(layer: nn.Module) -> tuple[int, int] | None:
    """`(out_features, in_features)` of a parameter, of one expert; None for a layer."""
    return layer.shape if isinstance(layer, ParameterOf) else None


def stacked_weight(layer: nn.Module) -> Tensor | None:
    """A parameter with three dimensions; None for a layer."""
    if not isinstance(layer, ParameterOf):
        return None
    return layer.weight if layer.weight.ndim == 3 else layer.weight[None]


def owner_of(layer: nn.Module) -> nn.Module:
    return layer.owner if isinstance(layer, ParameterOf) else layer


def base_of(name: str, layer: Any, layers: Mapping[str, Any]) -> nn.Module:
    """The base layer under one of PEFT's LoRA layers, or the parameter. `layers`: the adapter's, by PEFT's names."""
    base: nn.Module = layer.get_base_layer()
    if (part := getattr(layer, "parameter_name", None)) is not None:
        return part_of(base, part)
    if isinstance(base, nn.MultiheadAttention):
        return ParameterOf(base, IN_PROJ)
    attention = layers.get(place_of(name))
    if attention is not None and attention is not layer and INNER in name:
        return ParameterOf(attention.get_base_layer(), OUT_PROJ)
    return base


def bases_of(layers: Mapping[str, Any]) -> dict[str, nn.Module]:
    """`base_of` all layers of an adapter."""
    return {name: base_of(name, layer, layers) for name, layer in layers.items()}


def check_parameter(name: str, part: ParameterOf, in_features: int, frozen: bool) -> None:
    """An UnsupportedLayerError refuses a parameter under an adapter that would not be blind to its inputs."""
    owner, weight = part.owner, part.weight
    what = f"{name}: {part.parameter} {tuple(weight.shape)} of {type(owner).__name__}"
    if not frozen:
        problem = "PEFT adds the update to the weight and calls no lora_A, so that only a frozen one is blind"
        remedy = "Use GuardSpaceConfig with train='B', or leave it out of target_parameters and target_modules."
    elif not _is_dense(weight, (2, 3)) or getattr(owner, "_hf_tp_plan", None) is not None:
        problem = f"a {weight.dtype} parameter, or one that is split between processes, has no frozen form"
        remedy = "Load the model in 16 or 32 bits, or leave it out of target_parameters."
    elif in_features != part.shape[1]:
        problem = f"PEFT's lora_A has {in_features} features, and not the {part.shape[1]} of its inputs"
        remedy = "Leave it out of target_parameters."
    else:
        return
    raise UnsupportedLayerError(f"{what} cannot be protected: {problem}. {remedy}")


def observed(parts: Mapping[str, nn.Module]) -> list[str]:
    """Those whose side only a calibration can tell: it has seen their products, and refused the wrong side."""
    return sorted(name for name, part in parts.items() if isinstance(part, ParameterOf) and not part.is_known)


def check_sides(parts: Mapping[str, nn.Module], seen: Collection[str]) -> None:
    """Refuse parameters of layers whose kind does not say which side the inputs are on, unless calibration has seen it
    (`seen`). An UnsupportedLayerError names one.
    """
    if unseen := [name for name in observed(parts) if name not in seen]:
        name = unseen[0]
        raise UnsupportedLayerError(
            f"{name}: {parts[name].extra_repr()} cannot be protected: the kind of this layer does not say on which "
            "side its inputs are, and the subspace was not calibrated on its products. Calibrate it "
            "(subspace='auto'), or leave it out of target_parameters."
        )


def _is_dense(weight: Any, dimensions: tuple[int, ...]) -> bool:
    whole = isinstance(weight, Tensor) and weight.ndim in dimensions
    return whole and weight.dtype.is_floating_point and weight.itemsize > 1
