"""The factors of a loaded adapter and of a stored protected one; the frozen initial factors of a residual."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn

from peft_safety.core import base_weights as weights
from peft_safety.core import files
from peft_safety.core.adapter_dir import StoredAdapter
from peft_safety.core.factor_forms import Form
from peft_safety.core.names import walk
from peft_safety.core.plain_lora import ADAPTER_FILE, PREFIX, Factors, scaling_of
from peft_safety.core.projection import all_finite
from peft_safety.errors import ConfigError, UnsupportedLayerError
from peft_safety.layers import joined, stored_factors
from peft_safety.layers.adapters import config_table, tables, weights_of
from peft_safety.layers.factor_table import stored_entry


def layer_factors(name: str, layer: LoraLayer, adapter_name: str) -> Factors:
    """The factors of an adapter in one of its layers, not copied; with a residual the joined ones.

    Raises:
        ConfigError: an adapter is merged into the layer, or a factor is not finite.
        UnsupportedLayerError: a factor that is sharded or on the meta device.
    """
    if hasattr(layer, "num_experts") or isinstance(layer.get_base_layer(), nn.MultiheadAttention):
        raise UnsupportedLayerError(
            f"{name}: its factors are those of single parameters (experts, attention), not of one product. What "
            "save_pretrained writes is a plain LoRA already."
        )
    if layer.merged:
        raise ConfigError(f"{name}: an adapter is merged into the base weight. Call unmerge_adapter() first.")
    if not all(weights.is_whole(weight) for weight in weights_of(layer, adapter_name)):
        raise UnsupportedLayerError(f"{name}: its factors are sharded or on the meta device. Use the saved directory.")
    table_a, table_b = tables(layer)
    if isinstance(table_a, nn.ParameterDict):
        a, b = stored_entry(table_a, adapter_name), stored_entry(table_b, adapter_name)
    else:
        a, b = stored_factors(table_a[adapter_name], table_b[adapter_name])
    form = Form.of(layer.get_base_layer())
    if form.groups > 1:
        a, b = form.matrices(a, b)
    if not (all_finite(a) and all_finite(b)):
        shapes = f"lora_A {tuple(a.shape)} or lora_B {tuple(b.shape)}"
        raise ConfigError(f"{name}: {shapes} holds NaN or Inf. Load the last good checkpoint.")
    return Factors(a, b, float(layer.scaling[adapter_name]), weights.is_conv1d(layer.get_base_layer()), form)


def beside_factors(model: nn.Module, adapter_name: str) -> tuple[str, ...]:
    """What a loaded adapter trains that is no factor: whole modules, rows of embeddings, biases."""
    names = []
    for name, _, module in walk(model):
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            names.append(name)
        if isinstance(module, TrainableTokensWrapper) and adapter_name in module.token_adapter.trainable_tokens_delta:
            names.append(f"rows of {name}")
    kind = getattr(config_table(model)[adapter_name], "bias", "none")
    return tuple([*names, *([f"biases ({kind})"] if kind != "none" else [])])


def protected_factors(stored: StoredAdapter, modules: Iterable[str]) -> dict[str, Factors]:
    """The factors of some modules of a checked protected directory; with a residual the joined ones."""
    alphas = stored.config.get("alpha_pattern") or {}
    initials = ("lora_A.initial", "lora_B.initial") if stored.residual else ()
    factors = {}
    with files.open_tensors(stored.directory / ADAPTER_FILE) as handle:
        for name in modules:
            form = stored.forms[name]
            a, b = form.matrices(*(handle.get_tensor(f"{PREFIX}{form.key(name, kind)}") for kind in "AB"))
            initial = [handle.get_tensor(f"{PREFIX}{name}.{kind}") for kind in initials]
            scaling = scaling_of(alphas.get(name, stored.config["lora_alpha"]), stored.shapes[name][2], stored.config)
            factors[name] = Factors(*joined(a, b, *(initial or (None, None))), scaling, form=form)
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
