"""Which layers of a model hold an adapter, and which of them can be protected."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from peft_safety.core import base_weights as weights
from peft_safety.core import kinds, scales
from peft_safety.core.names import walk
from peft_safety.core.parameters import INNER, ParameterOf, base_of, check_parameter
from peft_safety.errors import UnsupportedLayerError
from peft_safety.layers.frozen_linear import FrozenLinear
from peft_safety.layers.protected_linear import ProtectedLinear

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

KINDS = ("Linear", "Linear4bit", "Linear8bitLt", "Conv1d", "Conv2d", "Conv3d", "Embedding")
"""PEFT's LoRA layers that can be protected."""
PACKED_KINDS = (
    "AqlmLoraLinear",
    "AwqLoraLinear",
    "EetqLoraLinear",
    "GPTQLoraLinear",
    "HqqLoraLinear",
    "IncLoraLinear",
    "TorchaoLoraLinear",
)
"""Those on weights that only their own library can multiply with. Each adds `s B A x` to its base layer's output."""


def config_table(model: nn.Module) -> dict[str, Any]:
    """PEFT's configs by adapter name, from the model or from one inside it; empty without adapters."""
    tables = (getattr(module, "peft_config", None) for module in model.modules())
    return next((table for table in tables if isinstance(table, dict)), {})


@contextmanager
def without_adapters(model: Any) -> Iterator[None]:
    """PEFT's `disable_adapter` makes every active adapter trainable afterwards. Here what was frozen stays so."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def adapter_layers(
    model: nn.Module, adapter_name: str, *, packed: bool = False, frozen: bool = False, linear: bool = False
) -> dict[str, LoraLayer]:
    """PEFT's LoRA layers that hold this adapter, by the module's name in the base model. An UnsupportedLayerError
    names one that cannot be protected. `packed`: whether base weights may be packed so that they cannot be read, as
    they may where leaves are in place. `frozen`: whether `lora_A` will be, as it must on single parameters. `linear`:
    convolutions and embeddings are refused, too.
    """
    layers: dict[str, LoraLayer] = {}
    for name, _, module in walk(model):
        layers |= {key: layer for key, layer in _stacked(name, module) if _holds(layer, adapter_name)}
    for name, layer in layers.items():
        base, kind = base_of(name, layer, layers), peft_kind(layer).__name__
        factors = [table._modules.get(adapter_name) for table in tables(layer)]
        is_frozen = frozen or isinstance(factors[0], FrozenLinear)
        if isinstance(base, ParameterOf) or kind == "ParamWrapper":
            part = base if isinstance(base, ParameterOf) else ParameterOf(base, "weight")
            check_parameter(name, part, int(layer.in_features), is_frozen)
            continue
        unread = packed or any(isinstance(factor, (FrozenLinear, ProtectedLinear)) for factor in factors)
        unread &= kind in PACKED_KINDS or (kind == "Linear" and weights.quantization(base) == "packed")
        usual = unread or (kind in KINDS and weights.supported(base)) or scales.library(base) is not None
        if not unread and (usual or scales.is_packed(base)):
            weights.check_readable(base, name)
        if kind in PACKED_KINDS and not usual:
            raise scales.refusal(base, name, "its weight is packed")
        if not usual:
            raise UnsupportedLayerError(
                f"{name}: {type(base).__name__}({base.extra_repr()}) under {kind} cannot be protected (only "
                "linear layers, Conv1D, convolutions and embeddings). Leave it out of target_modules."
            )
        _check_split(name, base, is_frozen)
        if linear and kinds.shape(base) is not None:
            raise UnsupportedLayerError(
                f"{name}: a {type(base).__name__}({base.extra_repr()}) is not supported here, only linear layers "
                "are. Train an adapter without it."
            )
    return layers


def _holds(layer: LoraLayer, adapter_name: str) -> bool:
    return adapter_name in layer.lora_A or adapter_name in layer.lora_embedding_A


def tables(layer: LoraLayer) -> tuple[Any, Any]:
    """The factors of a layer by adapter, `lora_A` and `lora_B`; an embedding has tables of parameters."""
    if kinds.is_embedding(layer.get_base_layer()):
        return layer.lora_embedding_A, layer.lora_embedding_B
    return layer.lora_A, layer.lora_B


def weights_of(layer: LoraLayer, adapter_name: str) -> tuple[nn.Parameter, nn.Parameter]:
    """The parameters `lora_A` and `lora_B` of an adapter; reading those of leaves folds them."""
    a, b = tables(layer)
    if isinstance(a, nn.ParameterDict):
        return getattr(a, adapter_name), getattr(b, adapter_name)
    return a[adapter_name].weight, b[adapter_name].weight


def _check_split(name: str, base: Any, frozen: bool) -> None:
    """Under tensor parallelism an UnsupportedLayerError refuses what needs the whole `lora_B` in each process."""
    plan = getattr(base, "_hf_tp_plan", None)
    weights.check_inputs(base, name)
    if plan is not None and not (frozen and weights.split_dimension(base) == 0):
        raise UnsupportedLayerError(
            f"{name}: tensor parallelism ({plan!r}) splits this {type(base).__name__}({base.extra_repr()}) between "
            "processes. Only a frozen lora_A, by train='B', is whole in each, and only on layers that are split by "
            "their outputs (column-wise). Use it, or leave the layer out of target_modules."
        )


def peft_kind(layer: nn.Module) -> type:
    """PEFT's own class of a LoRA layer: `registry.lora_layers` has subclasses of some."""
    kind: type = getattr(type(layer), "replaces", type(layer))
    return kind


def _stacked(name: str, module: nn.Module | None) -> Iterator[tuple[str, LoraLayer]]:
    """The LoRA layers at one place of a model, by PEFT's names: in a mixed model, other adapters may wrap them. Of
    attention, the layer on its output projection is one, too.
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    while isinstance(module, BaseTunerLayer):
        if isinstance(module, LoraLayer):
            yield name, module
            if isinstance(base := module.get_base_layer(), nn.MultiheadAttention):
                yield f"{name}{INNER}.out_proj", base.out_proj
        inner = module._modules.get("base_layer")
        if peft_kind(module).__name__ == "ParamWrapper":
            name += INNER
        module = inner
