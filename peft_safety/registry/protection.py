"""Is every protected adapter of a model still protected?"""

from __future__ import annotations

from collections.abc import Iterable

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from peft_safety.core import base_weights
from peft_safety.core.certificate import FrozenFactor
from peft_safety.core.names import own_name
from peft_safety.errors import LossyMergeError, ProtectionError
from peft_safety.layers.adapters import adapter_layers, config_table, tables
from peft_safety.layers.check import check_leaf
from peft_safety.layers.factor_table import check_constrained, check_frozen_table
from peft_safety.layers.frozen_linear import check_frozen
from peft_safety.methods.base import ProtectedConfig
from peft_safety.registry.attach import sides


def protected_configs(model: nn.Module) -> dict[str, ProtectedConfig]:
    return {name: config for name, config in config_table(model).items() if isinstance(config, ProtectedConfig)}


def assert_protected(model: nn.Module, adapter_name: str | None = None) -> None:
    """Check that every protected adapter still is: leaf, basis and weight of each of its modules, and that no ordinary
    adapter is active, or merged, beside one. Each adapter avoids its own subspace, so the sum of several avoids only
    what all of their subspaces have in common.

    Args:
        model: a PeftModel, or a model with injected adapters.
        adapter_name: one adapter; None checks all protected ones.

    Raises:
        ProtectionError: the model has no protected adapter, a module of one has lost its protection, or an ordinary
            adapter is active, or merged, beside one.
    """
    refuse_others(model)
    check_adapters(model, adapter_name)


def refuse_others(model: nn.Module, adapters: Iterable[str] | None = None) -> None:
    """Refuse, by a ProtectionError, ordinary adapters that are active, or merged, together with a protected one: no
    projection constrains the sum.
    """
    used: set[str] = set()
    for module in model.modules():
        if isinstance(module, BaseTunerLayer) and (adapters is not None or not module.disable_adapters):
            used |= module._get_available_adapters() & set(module.active_adapters if adapters is None else adapters)
            used |= set(module.merged_adapters)
    protected = protected_configs(model).keys()
    if used & protected and (others := sorted(used - protected)):
        raise ProtectionError(
            f"the ordinary adapters {others} are used together with {sorted(used & protected)}: their sum reaches the "
            "protected subspace. Use set_adapter, or adapter_names, to leave them out."
        )


def check_adapters(model: nn.Module, adapter_name: str | None = None) -> None:
    """`assert_protected` of the adapters themselves, whatever is active."""
    configs = protected_configs(model)
    if adapter_name is not None:
        configs = {name: config for name, config in configs.items() if name == adapter_name}
    if not configs:
        wanted = "" if adapter_name is None else f" {adapter_name!r}"
        raise ProtectionError(
            f"the model has no protected adapter{wanted}. Train with GuardSpaceConfig instead of LoraConfig, or make "
            "a trained adapter blind with peft-safety repair."
        )
    for name, config in configs.items():
        layers = adapter_layers(model, name)
        if set(layers) != set(config._modules):
            changed = sorted(set(layers) ^ set(config._modules))[:3]
            raise ProtectionError(f"adapter {name!r}: modules {changed} came or went since injection. Load it again.")
        for module, layer in layers.items():
            if config.freezes:
                modules = {} if config._certificate is None else config._certificate.modules
                _check_frozen(tables(layer)[0], name, f"{module} (adapter {name!r})", modules.get(module))
            for factor, side, basis in sides(layer, config, module):
                where = f"{module} (adapter {name!r})"
                if isinstance(factor, nn.ParameterDict) and basis is not None:
                    check_constrained(factor, name, where, basis, side)
                else:
                    check_leaf(factor[name], where, basis, side, config.residual)


def _check_frozen(table: nn.Module, adapter: str, name: str, certified: FrozenFactor | None) -> None:
    if isinstance(table, nn.ParameterDict):
        check_frozen_table(table, adapter, name, certified)
    else:
        check_frozen(table[adapter], name, certified)  # type: ignore[index]


def refuse_tied(model: nn.Module, name: str, base: nn.Module) -> None:
    """Refuse to merge into a base layer whose weight another module uses too: no basis constrains that one's inputs.

    Raises:
        LossyMergeError: the output embedding is tied to the input embedding, say.
    """
    weight = base._parameters.get("weight")
    others = [own_name(n) for n, m in model.named_modules() if m is not base and m._parameters.get("weight") is weight]
    if weight is not None and others:
        raise LossyMergeError(
            f"{name}: its weight {base_weights.shape(base)} is tied to {others[0]}, and a merge would change that "
            "module, too. Keep the adapter beside the base."
        )
