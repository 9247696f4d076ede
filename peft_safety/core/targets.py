"""Which layers a config targets: PEFT's rules for `target_modules`, without building an adapter."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from torch import nn

from peft_safety.core import base_weights as weights
from peft_safety.core import scales
from peft_safety.core.names import original, walk
from peft_safety.core.parameters import ParameterOf, input_parameter, parts_of, place_of, targeted
from peft_safety.errors import ConfigError


def base_layers(model: nn.Module, target_parameters: Iterable[str] | None = None) -> dict[str, nn.Module]:
    """Every base layer that can hold an adapter, by name, also under existing adapters. Of `target_parameters` those
    parameters, of other fused experts the parameter of their inputs, of PyTorch's attention both projections.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    modules = {name: original(module) for name, _, module in walk(model)}
    kinds: tuple[Callable[[nn.Module], object], ...] = (weights.supported, scales.is_packed)
    tuned = {name for name, _, module in walk(model) if isinstance(module, BaseTunerLayer)}
    result = {n: m for n, m in modules.items() if n in tuned or any(is_one(m) for is_one in kinds)}
    for name, module in modules.items():
        result |= parts_of(name, module, [part] if (part := input_parameter(module)) else ())
    return result | targeted(modules.items(), target_parameters)


def target_layers(
    model: nn.Module,
    target_modules: Iterable[str] | str | None,
    exclude_modules: Iterable[str] | str | None = None,
    *,
    target_parameters: Iterable[str] | None = None,
    packed: bool = False,
) -> dict[str, nn.Module]:
    """The layers that PEFT would match.

    Args:
        target_modules: names or suffixes, a regular expression for the full name, `"all-linear"` (all but the output
            embedding), or None for PEFT's default of this architecture.
        exclude_modules: those to leave out: names or suffixes, or a regular expression.
        target_parameters: names or ends of names of parameters. For the first product of fused experts
            `target_modules` may name the layer that holds it, too.
        packed: whether weights may be ones that cannot be read (GPTQ, AWQ, ...), or single parameters.

    Raises:
        ConfigError, UnsupportedLayerError: nothing matches, or no default is known; a match that cannot be protected.
    """
    if target_modules is None:
        target_modules = _default(model, required=not target_parameters)
    layers = base_layers(model, target_parameters)
    parameters = targeted(((name, original(module)) for name, _, module in walk(model)), target_parameters)
    if isinstance(target_modules, str) and target_modules.lower() == "all-linear":
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
        matched = {name: layer for name, layer in layers.items() if layer is not head and weights.is_linear(layer)}
    else:
        matched = _named(layers, target_modules, "target_modules")
    excluded = _named(matched, exclude_modules, "exclude_modules") if exclude_modules else {}
    selected = {name: layer for name, layer in matched.items() if name not in excluded}
    places = {place_of(name) for name in selected}
    selected |= {n: x for n, x in layers.items() if n in parameters or (_is_attention(x) and place_of(n) in places)}
    if not selected:
        some = ", ".join(sorted({name.rpartition(".")[2] for name in layers})[:10])
        but = f" but those of exclude_modules={exclude_modules!r}" if excluded else ""
        what = f"target_modules={target_modules!r} matches no linear layer, convolution or embedding of the model{but}"
        raise ConfigError(f"{what}. Give names such as {some}, or 'all-linear'.")
    for name, layer in selected.items():
        weights.check_inputs(layer, name)
        if not packed or not (weights.quantization(layer) == "packed" or isinstance(layer, ParameterOf)):
            weights.check_readable(layer, name)
    return selected


def _is_attention(layer: nn.Module) -> bool:
    return isinstance(layer, ParameterOf) and layer.is_attention


def _named(layers: Mapping[str, nn.Module], wanted: Iterable[str] | str, field: str) -> dict[str, nn.Module]:
    try:
        pattern = re.compile(wanted if isinstance(wanted, str) else rf"(.*\.)?({'|'.join(map(re.escape, wanted))})")
    except re.error as error:
        raise ConfigError(f"{field}={wanted!r} is no regular expression ({error}). Give names of layers.") from error
    return {name: layer for name, layer in layers.items() if pattern.fullmatch(name)}


def _default(model: nn.Module, required: bool) -> list[str]:
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in DEFAULTS and required:
        raise ConfigError(f"PEFT knows no default target_modules for model type {kind!r}. Give target_modules.")
    return list(DEFAULTS.get(kind, ()))
