"""VeLoRA (arXiv 2405.17991) on a protected `lora_A`: what it compresses are the inputs that the gradient needs. PEFT's
own forward would take the raw weight past its leaf, whose projection the gradient must see too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.variants import VeloraFunction, VeloraLinearVariant
from torch import Tensor

from peft_safety.layers import ProtectedLinear


class ProtectedVelora(VeloraLinearVariant):  # type: ignore[misc]
    """PEFT's, with the factors of a protected `lora_A`."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        leaf, embeds = module.lora_A[active_adapter], module.lora_velora_embed
        x = module.lora_dropout[active_adapter](x)
        if module.training and torch.is_grad_enabled():
            VeloraLinearVariant._maybe_update_embed(module, active_adapter, x)
            weight, initial = leaf.factors()
            sizes = module.lora_velora_num_groups[active_adapter], module.lora_velora_scale[active_adapter]
            inner = VeloraFunction.apply(x, weight, None, embeds[active_adapter], *sizes)
            if initial is not None:
                inner = torch.cat([inner, F.linear(x, initial)], dim=-1)
        else:
            inner = leaf(x)
        return result + module.lora_B[active_adapter](inner) * module.scaling[active_adapter]


def adopt(layer: LoraLayer, adapter_name: str) -> None:
    """Give a layer whose `lora_A` is protected this variant in place of PEFT's."""
    variant = layer.lora_variant.get(adapter_name)
    if type(variant) is VeloraLinearVariant and isinstance(layer.lora_A[adapter_name], ProtectedLinear):
        layer.lora_variant[adapter_name] = ProtectedVelora()
