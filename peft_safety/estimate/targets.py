"""Which layers of a model are meant: PEFT's matching rules for `target_modules`, without building an adapter."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from peft_safety import weights
from peft_safety.artifact import PREFIX
from peft_safety.errors import ConfigError, UnsupportedLayerError

ALL_LINEAR = "all-linear"


def canonical(name: str) -> str:
    """A module's name in the base model: without PEFT's and compile's prefixes and without `.base_layer`."""
    return name.removeprefix("_orig_mod.").removeprefix(PREFIX).removesuffix(".base_layer")


def base_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every base layer that an adapter could sit on, by canonical name, adapters that are already there looked through."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(inside) and inside:
            continue
        if isinstance(module, BaseTunerLayer):
            found[canonical(name)] = module.get_base_layer()
            inside = (*inside, f"{name}.")
        elif weights.supported(module):
            found[canonical(name)] = module
    return found


def target_layers(model: nn.Module, target_modules: Iterable[str] | str | None) -> dict[str, nn.Module]:
    """The layers that PEFT would match.

    Args:
        target_modules: names or suffixes, a regular expression for the full name, `"all-linear"` (all but the output embedding), or None for PEFT's
            default of this architecture.

    Raises:
        ConfigError: nothing matches, or no default is known.
        UnsupportedLayerError: a match that cannot be protected.
    """
    if target_modules is None:
        target_modules = _default(model)
    layers = base_layers(model)
    if target_modules == ALL_LINEAR:
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
        matched = {name: layer for name, layer in layers.items() if layer is not head and weights.supported(layer)}
    elif isinstance(target_modules, str):
        try:
            pattern = re.compile(target_modules)
        except re.error as error:
            raise ConfigError(f"target_modules={target_modules!r} is not a regular expression ({error}). Give names of layers, or a valid one.") from error
        matched = {name: layer for name, layer in layers.items() if pattern.fullmatch(name)}
    else:
        wanted = tuple(target_modules)
        matched = {name: layer for name, layer in layers.items() if name in wanted or name.endswith(tuple(f".{w}" for w in wanted))}
    for name, layer in matched.items():
        if not weights.supported(layer):
            raise UnsupportedLayerError(f"{name}: {type(layer).__name__} cannot be protected. Target Linear, Conv1D or bitsandbytes layers only.")
    if not matched:
        some = ", ".join(sorted({name.rpartition(".")[2] for name in layers})[:10])
        raise ConfigError(f"target_modules={target_modules!r} matches no linear layer of the model. Give names such as {some}, or 'all-linear'.")
    return matched


def _default(model: nn.Module) -> list[str]:
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in DEFAULTS:
        raise ConfigError(f"PEFT knows no default target_modules for model type {kind!r}. Give target_modules.")
    return list(DEFAULTS[kind])
