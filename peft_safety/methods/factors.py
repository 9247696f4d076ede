"""The factors of a loaded adapter and of a stored protected one; the frozen initial factors of a residual."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from peft_safety.core import base_weights as weights
from peft_safety.core import files
from peft_safety.core.adapter_dir import StoredAdapter
from peft_safety.core.plain_lora import ADAPTER_FILE, PREFIX, Factors, scaling_of
from peft_safety.core.projection import all_finite
from peft_safety.errors import ConfigError, UnsupportedLayerError
from peft_safety.layers import joined, stored_factors


def layer_factors(name: str, layer: LoraLayer, adapter_name: str) -> Factors:
    """The factors of an adapter in one of its layers, not copied; with a residual the joined ones.

    Raises:
        ConfigError: an adapter is merged into the layer, or a factor is not finite.
        UnsupportedLayerError: a factor that is sharded or on the meta device.
    """
    if hasattr(layer, "num_experts"):
        raise UnsupportedLayerError(
            f"{name}: its factors are those of {layer.num_experts} fused experts, not one product. What "
            "save_pretrained writes is a plain LoRA already."
        )
    if layer.merged:
        raise ConfigError(f"{name}: an adapter is merged into the base weight. Call unmerge_adapter() first.")
    leaves = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
    if not all(weights.is_whole(leaf.weight) for leaf in leaves):
        raise UnsupportedLayerError(f"{name}: its factors are sharded or on the meta device. Use the saved directory.")
    a, b = stored_factors(*leaves)
    if not (all_finite(a) and all_finite(b)):
        shapes = f"lora_A {tuple(a.shape)} or lora_B {tuple(b.shape)}"
        raise ConfigError(f"{name}: {shapes} holds NaN or Inf. Load the last good checkpoint.")
    return Factors(a, b, float(layer.scaling[adapter_name]), weights.is_conv1d(layer.get_base_layer()))


def protected_factors(stored: StoredAdapter, modules: Iterable[str]) -> dict[str, Factors]:
    """The factors of some modules of a checked protected directory; with a residual the joined ones."""
    alphas = stored.config.get("alpha_pattern") or {}
    kinds = ("lora_A.weight", "lora_B.weight", "lora_A.initial", "lora_B.initial")[: 4 if stored.residual else 2]
    factors = {}
    with files.open_tensors(stored.directory / ADAPTER_FILE) as handle:
        for name in modules:
            a, b, *initial = (handle.get_tensor(f"{PREFIX}{name}.{kind}") for kind in kinds)
            scaling = scaling_of(alphas.get(name, stored.config["lora_alpha"]), stored.shapes[name][2], stored.config)
            factors[name] = Factors(*joined(a, b, *(initial or (None, None))), scaling)
    return factors


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
