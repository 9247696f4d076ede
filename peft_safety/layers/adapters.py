"""Which layers of a model hold an adapter, and which of them can be protected."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from peft_safety.core import base_weights as weights
from peft_safety.core import scales
from peft_safety.core.names import walk
from peft_safety.errors import UnsupportedLayerError

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

KINDS = ("Linear", "Linear4bit", "Linear8bitLt")
"""PEFT's LoRA layers that can be protected."""


def config_table(model: nn.Module) -> dict[str, Any]:
    """PEFT's configs by adapter name, from the model or from one inside it; empty without adapters."""
    tables = (getattr(module, "peft_config", None) for module in model.modules())
    return next((table for table in tables if isinstance(table, dict)), {})


def adapter_layers(model: nn.Module, adapter_name: str) -> dict[str, LoraLayer]:
    """The LoRA layers of an adapter by the base model's names; an UnsupportedLayerError if it cannot be protected."""
    layers = {}
    for name, _, module in walk(model):
        for layer in _stacked(module):
            if adapter_name not in layer.lora_A and adapter_name not in layer.lora_embedding_A:
                continue
            base, kind = layer.get_base_layer(), peft_kind(layer).__name__
            usual = kind in KINDS and weights.supported(base)
            if usual or scales.is_packed(base):
                weights.check_readable(base, name)
            if not usual or getattr(base, "_hf_tp_plan", None) is not None:
                raise UnsupportedLayerError(
                    f"{name}: a {type(base).__name__} under {kind} cannot be protected (only Linear, Conv1D and "
                    "bitsandbytes layers, not split by tensor parallelism). Leave it out of target_modules."
                )
            layers[name] = layer
            break
    return layers


def peft_kind(layer: nn.Module) -> type:
    """PEFT's own class of a LoRA layer: `registry.lora_layers` has subclasses of some."""
    kind: type = getattr(type(layer), "replaces", type(layer))
    return kind


def _stacked(module: nn.Module | None) -> Iterator[LoraLayer]:
    """The LoRA layers at one place of a model: in a mixed model, other adapters may wrap them."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    while isinstance(module, BaseTunerLayer):
        if isinstance(module, LoraLayer):
            yield module
        module = getattr(module, "base_layer", None)
