"""The frozen initial factors of a residual: set when an adapter is made, read back when it is loaded."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from peft_safety import files
from peft_safety.artifact import ADAPTER_FILE, PREFIX, StoredAdapter
from peft_safety.layers import fresh


@torch.no_grad()
def start_from(layer: LoraLayer, adapter_name: str, b: Tensor, a: Tensor) -> None:
    """Set the initial factors of a residual. A layer narrower than r has fewer components than that: the others start as plain LoRA's do, at B = 0."""
    leaf_a, leaf_b = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
    found, rank = a.shape[0], int(layer.r[adapter_name])
    if found < rank:
        own = leaf_a.weight
        a = torch.cat([a.to(own), own[found:]])
        b = nn.functional.pad(b, (0, rank - found))
    leaf_a.set_initial(a)
    leaf_b.set_initial(b)


def restore_initial(layers: Mapping[str, LoraLayer], adapter_name: str, stored: StoredAdapter) -> None:
    """Frozen factors come with the directory, like the bases: transformers' loader, for one, loads parameters only."""
    with files.open_tensors(files.child(stored.directory, ADAPTER_FILE)) as handle:
        keys = {key.removeprefix(PREFIX): key for key in handle.keys()}  # noqa: SIM118
        for name, layer in layers.items():
            for factor in ("lora_A", "lora_B"):
                leaf = getattr(layer, factor)[adapter_name]
                leaf.initial = fresh(handle.get_tensor(keys[f"{name}.{factor}.initial"]).to(leaf.initial.device))
