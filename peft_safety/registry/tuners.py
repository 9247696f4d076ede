"""Subclasses of PEFT's tuners. They refuse merges and combinations that would lose the protection."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from peft.tuners.lora import LoraModel
from peft.tuners.mixed import MixedModel

from peft_safety.core.base_weights import is_whole
from peft_safety.core.projection import all_finite
from peft_safety.errors import ConfigError, ProtectionError
from peft_safety.layers.adapters import adapter_layers, tables
from peft_safety.layers.factor_table import fold_tables, raw_factors
from peft_safety.layers.stored import lay_out_adapter
from peft_safety.methods.base import ProtectedConfig
from peft_safety.registry import frozen
from peft_safety.registry.lora_layers import refuse_lossy_merge
from peft_safety.registry.protection import check_adapters, protected_configs, refuse_others, refuse_tied


class _Merges:
    """Refuses merges of what is not protected any more, and into k-bit weights, before anything is merged. What is
    taken out of the model is forgotten.
    """

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        _check_merge(self, adapter_names)
        super().merge_adapter(adapter_names, safe_merge)  # type: ignore[misc]

    def _unload_and_optionally_merge(self, merge: bool = True, **options: Any) -> Any:
        if merge:
            _check_merge(self, options.get("adapter_names"))
        result = super()._unload_and_optionally_merge(merge, **options)  # type: ignore[misc]
        _forget(result, ())
        return result

    def delete_adapter(self, adapter_name: Any) -> None:
        super().delete_adapter(adapter_name)  # type: ignore[misc]
        tuner: Any = self
        _forget(tuner.model, tuner.peft_config)


def _forget(model: Any, kept: Collection[str]) -> None:
    """Drop the configs, with their bases, that injection has noted of other adapters than those that are kept."""
    for module in model.modules():
        known = vars(module).get("_protected", {})
        for name in known.keys() - kept:
            del known[name]


def _check_merge(model: Any, adapter_names: list[str] | None) -> None:
    refuse_others(model, adapter_names)
    for adapter in protected_configs(model):
        layers = adapter_layers(model, adapter)
        for name, layer in layers.items():
            if adapter in (adapter_names or layer.active_adapters):
                _refuse_broken(layer, adapter, name)
        if any(adapter in (adapter_names or layer.active_adapters) for layer in layers.values()):
            check_adapters(model, adapter)
        for name, layer in layers.items():
            if adapter in (adapter_names or layer.active_adapters):
                refuse_tied(model, name, layer.get_base_layer())
                refuse_lossy_merge(layer, adapter, name)


def _refuse_broken(layer: Any, adapter: str, name: str) -> None:
    """PEFT's own words, by which people look for what happened. PEFT asks with `safe_merge` only."""
    for kind, table in zip(("lora_A", "lora_B"), tables(layer), strict=True):
        factor = table._parameters.get(adapter)  # of an embedding
        if adapter in table._modules:
            factor = table[adapter]._parameters.get("weight")
        if factor is not None and is_whole(factor) and not all_finite(factor):
            raise ProtectionError(
                f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken: {kind} "
                f"{tuple(factor.shape)} of {name} holds NaN or Inf. Load the last good checkpoint."
            )


class ProtectedLoraModel(_Merges, LoraModel):  # type: ignore[misc]
    _combining = False  # injection marks the config of a combination

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Refuse to combine adapters of several subspaces, with plain LoRA, or with residuals."""
        exists = adapter_name in self.peft_config  # then PEFT does nothing
        configs = {name: self.peft_config[name] for name in adapters if name in self.peft_config and not exists}
        protected = {
            name: config
            for name, config in configs.items()
            if isinstance(config, ProtectedConfig) and (config.sides or config.freezes)
        }
        if protected:
            digests = {(config.subspace_id, config.freezes) for config in protected.values()}
            if len(protected) < len(configs) or len(digests) > 1:
                raise ConfigError(f"adapters {adapters} do not share one safety subspace. Combine adapters that do.")
            if any(config.residual for config in protected.values()):
                raise ConfigError(f"adapters {adapters}: a weighted sum loses a residual. Use export_lora first.")
        self._combining = True
        try:
            with raw_factors():
                fold_tables(self)
                super().add_weighted_adapter(adapters, weights, adapter_name, *args, **kwargs)
        finally:
            self._combining = False
        first = next(iter(protected.values()), None)
        if first is not None and first.freezes:
            frozen.combined(adapter_layers(self, adapter_name), adapter_name, self.peft_config, adapters)
        elif protected:  # some combinations are slices of an SVD, not contiguous
            lay_out_adapter(self, adapter_name)
            fold_tables(self)


class ProtectedMixedModel(_Merges, MixedModel):  # type: ignore[misc]
    """The tuner of several kinds of adapters."""


KINDS: dict[type, type] = {LoraModel: ProtectedLoraModel, MixedModel: ProtectedMixedModel}
for _kind, _own in KINDS.items():
    _own.__name__ = _kind.__name__  # which PEFT's get_model_status reports


def adopt(tuner: Any, config: ProtectedConfig) -> None:
    """Make one of PEFT's tuners the subclass of its kind. A ConfigError refuses any other tuner."""
    if type(tuner) not in (*KINDS, *KINDS.values()):
        raise ConfigError(f"{type(tuner).__name__} builds no layers that can be protected. Use get_peft_model.")
    tuner.__class__ = KINDS.get(type(tuner), type(tuner))
