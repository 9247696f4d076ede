"""Wrapped around PEFT's injection: the protected leaves go in, or everything comes out again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import nn

from peft_safety import weights
from peft_safety.errors import ConfigError, PeftSafetyError
from peft_safety.names import pin, places, walk


def inject_adapter(
    original: Callable[..., None], self: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
) -> None:
    """PEFT builds its layers, then the protected leaves go in. If anything fails, the model is put back as it was."""
    from peft_safety.methods.attach import attach
    from peft_safety.methods.protected import ProtectedConfig, check_ahead
    from peft_safety.methods.reuse import private

    given = self.peft_config[adapter_name]
    if not isinstance(given, ProtectedConfig):
        return original(self, model, adapter_name, *args, **kwargs)
    _check_tuner(self, given)
    check_ahead(model, given)
    config = self.peft_config[adapter_name] = private(given)
    if config._stored is not None:
        pin(config, config._modules, places(model))
    if not config.inference_mode:
        weights.stay_unpacked(model)
    modules = dict(model.named_modules())
    where = [(own, name) for own, name, _ in walk(model, shared=True)]
    parameters = [(module, dict(module._parameters)) for module in modules.values()]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        config._injecting = True
        original(self, model, adapter_name, *args, **kwargs)
        gone = attach(
            model,
            adapter_name,
            config,
            self.peft_config,
            lambda names: _take_out(adapter_name, modules, _wanted(where, names)),
        )
        self.targeted_module_names = [name for name in self.targeted_module_names if name not in _wanted(where, gone)]
    except BaseException as error:
        _undo(model, adapter_name, modules)
        for module, own in parameters:  # PEFT's MultiheadAttention registers its base weights anew
            module._parameters.clear()
            module._parameters.update(own)
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)
        if isinstance(error, ValueError) and not isinstance(
            error, PeftSafetyError
        ):  # PEFT's own, such as no module matched
            raise ConfigError(
                f"{type(config).__name__}: {error} Give target_modules that the model has, or 'all-linear'."
            ) from error
        raise
    finally:
        config._injecting = False
    return None


def _wanted(own: Sequence[tuple[str, str]], names: Collection[str]) -> set[str]:
    """Where modules of these names in the base model are: `own` has the pairs of both. A mixed model is injected into
    from outside, with PEFT's prefix.
    """
    return {place for name, place in own if name in names}


def _check_tuner(tuner: Any, config: Any) -> None:
    from peft.tuners.adalora import AdaLoraModel
    from peft.tuners.lora import LoraModel
    from peft.tuners.mixed import MixedModel

    if not isinstance(tuner, (LoraModel, MixedModel)) or isinstance(tuner, AdaLoraModel):
        raise ConfigError(
            f"{type(config).__name__}: {type(tuner).__name__} does not build LoRA layers. Use get_peft_model, which "
            "takes LoraModel for it."
        )


def update_layer(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    """Every LoRA layer gets its factors here. Past the injection they would be plain ones, so a protected config is
    refused.
    """
    from peft_safety.methods.protected import ProtectedConfig

    config = next((value for value in (*args, *kwargs.values()) if isinstance(value, ProtectedConfig)), None)
    if config is not None and not config._injecting:
        raise ConfigError(
            f"{type(config).__name__}: a {type(self).__name__} layer built by itself would not be protected. Use "
            "get_peft_model, add_adapter or "
            "inject_adapter_in_model."
        )
    return original(self, *args, **kwargs)


def _undo(model: nn.Module, adapter_name: str, before: dict[str, nn.Module]) -> None:
    """Take a half-made adapter out again."""
    _take_out(adapter_name, before)
    table = getattr(model, "peft_config", None)
    if isinstance(table, dict):
        table.pop(adapter_name, None)
    if not table:  # transformers marks the model before it injects
        vars(model).pop("_hf_peft_config_loaded", None)


def _take_out(adapter_name: str, before: dict[str, nn.Module], names: Collection[str] | None = None) -> None:
    """Modules that were replaced come back, layers that were there before lose the adapter: all of them, or those of
    some names.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in before.items():
        if names is not None and name not in names:
            continue
        if isinstance(module, BaseTunerLayer):
            module.delete_adapter(adapter_name)
        parent, _, child = name.rpartition(".")
        if name and parent in before and getattr(before[parent], child, None) is not module:
            setattr(before[parent], child, module)
