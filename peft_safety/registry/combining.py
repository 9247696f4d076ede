"""Wrapped around what PEFT makes of trained adapters: merges, weighted sums, hot-swaps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from peft_safety import weights
from peft_safety.errors import ArtifactError, ConfigError, LossyMergeError


def get_delta_weight(original: Callable[..., Any], self: Any, adapter: str, *args: Any, **kwargs: Any) -> Any:
    """What is merged or converted: `s (C B A - C B0 A0)` where a residual exists, PEFT's `s B A` (B already folded)
    elsewhere.
    """
    from peft.utils.other import transpose

    delta = original(self, adapter, *args, **kwargs)
    frozen_a, frozen_b = getattr(self.lora_A[adapter], "initial", None), getattr(self.lora_B[adapter], "initial", None)
    if frozen_a is None or frozen_b is None:
        return delta
    frozen = (
        transpose(frozen_b.float() @ frozen_a.float(), getattr(self, "fan_in_fan_out", False)) * self.scaling[adapter]
    )
    return (delta.float() - frozen).to(delta.dtype)


def merge_adapter(
    original: Callable[..., None], self: Any, adapter_names: list[str] | None = None, safe_merge: bool = False
) -> None:
    _refuse_lossy_merge(self, adapter_names)
    original(self, adapter_names, safe_merge)


def unload_and_optionally_merge(
    original: Callable[..., Any],
    self: Any,
    merge: bool = True,
    progressbar: bool = False,
    safe_merge: bool = False,
    adapter_names: list[str] | None = None,
) -> Any:
    if merge:
        _refuse_lossy_merge(self, adapter_names)
    return original(self, merge, progressbar, safe_merge, adapter_names)


def _refuse_lossy_merge(model: Any, adapter_names: list[str] | None) -> None:
    """Merging a protected update into a k-bit weight rounds most of it away, and what is left leaks: refuse, with the
    figure, before anything is merged.
    """
    from peft_safety.methods.protected import adapter_layers, protected_configs

    for adapter in protected_configs(model):
        for name, layer in adapter_layers(model, adapter).items():
            base = layer.get_base_layer()
            kind = weights.quantization(base)
            if kind is not None and adapter in (adapter_names or layer.active_adapters):
                kept = weights.merge_survival(base, layer.get_delta_weight(adapter), name)
                raise LossyMergeError(
                    f"{name}: merging into a {kind} weight would keep {kept:.1%} of the update of adapter {adapter!r} "
                    "and let the rest leak into the protected "
                    "subspace. Keep the adapter beside the base, or merge into dequantized weights with "
                    "peft_safety.merge_dequantized(model)."
                )


def add_weighted_adapter(
    original: Callable[..., None],
    self: Any,
    adapters: list[str],
    weights: list[float],
    adapter_name: str,
    *args: Any,
    **kwargs: Any,
) -> None:
    """A combination is constrained by one subspace: refuse to mix subspaces, plain LoRA and residuals. Some
    combinations are slices of an SVD, which PEFT puts in place as they lie."""
    from peft_safety.layers import lay_out_adapter
    from peft_safety.methods.protected import ProtectedConfig

    there = adapter_name in self.peft_config  # then PEFT does nothing
    configs = {name: self.peft_config[name] for name in adapters if name in self.peft_config and not there}
    protected = {
        name: config for name, config in configs.items() if isinstance(config, ProtectedConfig) and config.sides
    }
    if protected:
        digests = {config.subspace.digest for config in protected.values()}
        if len(protected) < len(configs) or len(digests) > 1:
            raise ConfigError(
                f"adapters {adapters} do not share one safety subspace; their combination would not keep it. Combine "
                "adapters of one subspace."
            )
        if any(config.residual for config in protected.values()):
            raise ConfigError(
                f"adapters {adapters}: one has a residual (init='task' or 'guardspace'), which a weighted sum of "
                "factors would lose. Use export_lora first."
            )
    original(self, adapters, weights, adapter_name, *args, **kwargs)
    if protected:
        lay_out_adapter(self, adapter_name)


def get_padded_linear(
    original: Callable[..., Any], lora_module: Any, target_rank: int, is_lora_A: bool, **kwargs: Any
) -> Any:
    """`prepare_model_for_compiled_hotswap` replaces the factors by wider plain ones: keep them protected."""
    from peft_safety.layers import ProtectedLinear

    padded = original(lora_module, target_rank, is_lora_A, **kwargs)
    if not isinstance(lora_module, ProtectedLinear) or padded is lora_module:
        return padded
    if lora_module.initial is not None:
        raise ConfigError(
            "an adapter with a residual (init='task' or 'guardspace') cannot be padded for compiled hot-swapping. Use "
            "export_lora first."
        )
    return ProtectedLinear.replacing(padded, lora_module.basis, lora_module.side)


def hotswap_adapter_from_state_dict(
    original: Callable[..., None],
    model: nn.Module,
    state_dict: dict[str, Any],
    adapter_name: str,
    config: Any,
    *args: Any,
    **kwargs: Any,
) -> None:
    """Swap the factors, and the bases with them."""
    from peft_safety.methods.protected import ProtectedConfig, adapter_layers, bind, config_table, protected_configs
    from peft_safety.methods.reuse import remember

    there = protected_configs(model).get(adapter_name)
    if there is None and not isinstance(config, ProtectedConfig):
        return original(model, state_dict, adapter_name, config, *args, **kwargs)
    if not isinstance(config, ProtectedConfig):
        raise ConfigError(
            f"adapter {adapter_name!r} is protected; a {type(config).__name__} cannot be swapped into it. Load it "
            "under a new name."
        )
    layers = adapter_layers(model, adapter_name)
    if config.residual or (there is not None and there.residual):
        raise ConfigError(
            "an adapter with a residual (init='task' or 'guardspace') cannot be hot-swapped. Use export_lora first."
        )
    if there is not None and there.sides != config.sides:  # the leaf of a side that is constrained no more would stay
        raise ConfigError(
            f"adapter {adapter_name!r} is constrained on sides {there.sides}, the new one on {config.sides}. Load it "
            "under a new name."
        )
    subspace = config.subspace
    if set(subspace.bases) != set(layers):
        odd = sorted(set(subspace.bases) ^ set(layers))[:3]
        raise ArtifactError(
            f"the new adapter and {adapter_name!r} target other modules; they differ at {odd}. Load it under a new "
            "name."
        )
    subspace.check_fits({name: layer.get_base_layer() for name, layer in layers.items()}, config.basis_sides)
    original(model, state_dict, adapter_name, config, *args, **kwargs)
    config._modules = {
        name: (int(layer.r[adapter_name]), layer.lora_alpha[adapter_name]) for name, layer in layers.items()
    }
    remember(config, loaded=True)
    config_table(model)[adapter_name] = config
    bind(layers, adapter_name, config)
    return None
