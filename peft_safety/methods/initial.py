"""The frozen initial factors of a residual: set when an adapter is made."""

from __future__ import annotations

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn


@torch.no_grad()
def start_from(layer: LoraLayer, adapter_name: str, b: Tensor, a: Tensor) -> None:
    """Set the initial factors of a residual. Components that a layer lacks start as plain LoRA's do, at B = 0."""
    leaf_a, leaf_b = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
    components, rank = a.shape[0], int(layer.r[adapter_name])
    if components < rank:
        own = leaf_a.weight
        a = torch.cat([a.to(own), own[components:]])
        b = nn.functional.pad(b, (0, rank - components))
    leaf_a.set_initial(a)
    leaf_b.set_initial(b)
