"""Wrapped around PEFT's hot-swapping: the bases are swapped with the factors."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from safetensors.torch import load_file
from torch import nn

from peft_safety.core import kinds
from peft_safety.core.names import listed
from peft_safety.core.plain_lora import ADAPTER_FILE, PREFIX
from peft_safety.core.snapshot import named
from peft_safety.errors import ArtifactError, ConfigError
from peft_safety.layers import FrozenLinear, ProtectedLinear
from peft_safety.layers.adapters import adapter_layers, config_table
from peft_safety.methods.base import ProtectedConfig
from peft_safety.registry.attach import bind
from peft_safety.registry.checks import check_ahead
from peft_safety.registry.protection import protected_configs
from peft_safety.registry.reuse import NEW_NAME, remember, rescale, resize
from peft_safety.registry.rollback import Before, undone
from peft_safety.registry.tuners import adopt

NO_RESIDUAL = "an adapter with a residual (init='task' or 'guardspace') cannot"


def pad_lora_weights(original: Callable[..., bool], model: nn.Module, target_rank: int) -> bool:
    """`prepare_model_for_compiled_hotswap` replaces the factors by wider plain ones: keep them protected."""
    leaves = [
        (layer, table, name, leaf)
        for layer in model.modules()
        if isinstance(layer, LoraLayer)
        for table in (layer.lora_A, layer.lora_B)
        for name, leaf in table.items()
        if isinstance(leaf, (FrozenLinear, ProtectedLinear))
    ]
    for layer, _, name, leaf in leaves:
        residual = isinstance(leaf, ProtectedLinear) and leaf.initial is not None
        if residual and layer.r[name] != target_rank:
            raise ConfigError(f"{NO_RESIDUAL} be padded for compiled hot-swapping. Use export_lora first.")
    try:
        found = original(model, target_rank)
    finally:
        for _, table, name, leaf in leaves:
            if (padded := table[name]) is leaf:
                continue
            if isinstance(leaf, FrozenLinear):
                table[name] = FrozenLinear.replacing(padded, *leaf.behind)
            else:
                table[name] = ProtectedLinear.replacing(padded, leaf.basis, leaf.side)
    for name, config in protected_configs(model).items():
        resize(adapter_layers(model, name), name, config)
    return found


def hotswap_adapter_from_state_dict(
    original: Callable[..., None],
    model: nn.Module,
    state_dict: dict[str, Any],
    adapter_name: str,
    config: Any,
    *args: Any,
    **kwargs: Any,
) -> None:
    current = protected_configs(model).get(adapter_name)
    if current is None and not isinstance(config, ProtectedConfig):
        return original(model, state_dict, adapter_name, config, *args, **kwargs)
    if not isinstance(config, ProtectedConfig):
        raise ConfigError(f"a {type(config).__name__} cannot replace the protected {adapter_name!r}. {NEW_NAME}")
    if any(adapter_name in m.merged_adapters for m in model.modules() if isinstance(m, BaseTunerLayer)):
        raise ConfigError(f"adapter {adapter_name!r} is merged into the base weights. Call unmerge_adapter() first.")
    snapshot = config._snapshot
    if snapshot is not None and sys._getframe(2).f_code.co_name == "hotswap_adapter":
        device = next((str(x.device) for x in state_dict.values()), "cpu")
        tensors = load_file(snapshot.path / ADAPTER_FILE, device=device)  # not what the file holds by now
        state_dict = {_with_name(key, adapter_name): tensor for key, tensor in tensors.items()}
    with undone(Before(model, adapter_name), f"adapter {adapter_name!r}"), named(snapshot):
        check_ahead(model, config)
        layers = adapter_layers(model, adapter_name)
        if tables := [name for name, layer in layers.items() if kinds.is_embedding(layer.get_base_layer())]:
            raise ConfigError(f"{listed(tables)}: the factors of an embedding cannot be hot-swapped. {NEW_NAME}")
        if config.freezes or (current is not None and current.freezes):
            if current is None or not (current.freezes and config.is_plain):
                raise ConfigError(
                    f"{adapter_name!r} and the new adapter must both have a saved frozen lora_A. {NEW_NAME}"
                )
            _check_factors(state_dict, config)
        else:
            _check_fits(layers, adapter_name, current, config)
            for tuner in (module for module in model.modules() if isinstance(module, BaseTuner)):
                adopt(tuner, config)
        original(model, state_dict, adapter_name, config, *args, **kwargs)
        config._modules = rescale(layers, adapter_name, config)
        remember(config, loaded=True)
        config_table(model)[adapter_name] = config
        if not config.freezes:
            bind(layers, adapter_name, config)
        resize(layers, adapter_name, config)
    config._snapshot = None
    return None


def _with_name(key: str, adapter_name: str) -> str:
    """The key of a stored factor in a model: the adapter's name stands before `weight`."""
    module, _, kind = key.rpartition(".")
    return f"{module}.{adapter_name}.{kind}" if module.endswith((".lora_A", ".lora_B")) else key


def _check_fits(
    layers: dict[str, LoraLayer], adapter_name: str, current: ProtectedConfig | None, config: ProtectedConfig
) -> None:
    if config.residual or (current is not None and current.residual):
        raise ConfigError(f"adapter {adapter_name!r}: {NO_RESIDUAL} be hot-swapped. Use export_lora first.")
    if current is not None and current.sides != config.sides:  # a leaf of the other side would stay
        raise ConfigError(
            f"{adapter_name!r} is constrained on sides {current.sides}, the new one on {config.sides}. {NEW_NAME}"
        )
    subspace = config.subspace
    if set(subspace.bases) != set(layers):
        mismatched = sorted(set(subspace.bases) ^ set(layers))[:3]
        raise ArtifactError(f"{adapter_name!r} and the new adapter differ in modules: {mismatched}. {NEW_NAME}")
    subspace.check_fits({name: layer.get_base_layer() for name, layer in layers.items()}, config.basis_sides)


def _check_factors(state_dict: dict[str, Any], config: ProtectedConfig) -> None:
    """Refuse a `lora_A` that is not the one of the config's certificate. transformers passes the old config."""
    assert config._certificate is not None
    modules = config._certificate.modules
    for key, tensor in state_dict.items():
        module, _, kind = key.removeprefix(PREFIX).partition(".lora_A")
        if kind and (module not in modules or modules[module].precision(tensor.flatten(1)) is None):
            raise ArtifactError(
                f"{key} {tuple(tensor.shape)} is not the frozen factor that the certificate vouches for. Use "
                f"peft.utils.hotswap.hotswap_adapter with a certified directory. {NEW_NAME}"
            )
