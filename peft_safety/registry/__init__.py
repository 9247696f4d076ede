"""The package's place in PEFT: the only folder that touches PEFT's internals.

A protected config keeps `peft_type == LORA` at run time, so that every gate in peft, transformers and trl stays open,
and is stored under its own name, which PEFT resolves through its config mapping. PEFT's functions are wrapped, each by
a few lines in the files beside this one; `SYMBOLS` names everything that is relied on, and a canary test checks all of
it against the installed PEFT.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

from peft_safety.registry import combining, injection, storage
from peft_safety.registry.types import config_types

SYMBOLS = {
    "peft.mapping": (
        "PEFT_TYPE_TO_CONFIG_MAPPING",
        "PEFT_TYPE_TO_TUNER_MAPPING",
        "PEFT_TYPE_TO_PREFIX_MAPPING",
        "PEFT_TYPE_TO_MIXED_MODEL_MAPPING",
    ),
    "peft.config": (
        "PeftConfigMixin.from_pretrained",
        "PeftConfigMixin.from_json_file",
        "PeftConfigMixin._get_peft_type",
    ),
    "peft.peft_model": ("PeftModel.save_pretrained", "PeftModel.load_adapter", "set_peft_model_state_dict"),
    "peft.tuners.lora": ("LoraModel.add_weighted_adapter", "LoraLayer.lora_A", "LoraLayer.lora_B"),
    "peft.tuners.adalora": ("AdaLoraModel",),
    "peft.tuners.tuners_utils": (
        "BaseTuner._unload_and_optionally_merge",
        "BaseTuner.merge_adapter",
        "BaseTuner.inject_adapter",
        "BaseTunerLayer.get_base_layer",
        "BaseTunerLayer.enable_adapters",
        "BaseTunerLayer.delete_adapter",
    ),
    "peft.tuners.lora.layer": (
        "Linear.get_delta_weight",
        "LoraLayer.update_layer",
        "Embedding.update_layer",
        "_ConvNd.update_layer",
    ),
    "peft.tuners.mixed": ("MixedModel._unload_and_optionally_merge",),
    "peft.utils.hotswap": ("_get_padded_linear", "hotswap_adapter_from_state_dict"),
}
"""Every PEFT symbol that is read or wrapped, by module. Instance attributes (`LoraLayer.lora_A`) are checked on an
instance.
"""

QUANTISED = {
    "peft.tuners.lora.bnb": ("Linear4bit.forward", "Linear4bit.get_delta_weight", "Linear8bitLt.get_delta_weight")
}
"""The same, where bitsandbytes is installed."""

_done = False


def register() -> None:
    """Make PEFT know the protected types. Called once, when `peft_safety` and `peft` are both imported; calling it
    again does nothing.
    """
    global _done  # noqa: PLW0603
    if _done:
        return
    _done = True
    import peft.peft_model
    import peft.tuners.lora
    from peft import mapping
    from peft.config import PeftConfigMixin
    from peft.tuners.lora import layer as lora_layer
    from peft.tuners.mixed import MixedModel
    from peft.tuners.tuners_utils import BaseTuner
    from peft.utils import hotswap

    tables = (
        mapping.PEFT_TYPE_TO_CONFIG_MAPPING,
        mapping.PEFT_TYPE_TO_TUNER_MAPPING,
        mapping.PEFT_TYPE_TO_PREFIX_MAPPING,
        mapping.PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    )
    for name, cls in config_types().items():
        values: tuple[Any, ...] = (cls, peft.tuners.lora.LoraModel, "lora_", peft.tuners.lora.LoraModel)
        for table, value in zip(tables, values, strict=True):
            table[name] = value

    _wrap(PeftConfigMixin, "from_json_file", storage.from_json_file)
    _wrap(PeftConfigMixin, "from_pretrained", storage.config_from_pretrained)
    _wrap(PeftConfigMixin, "_get_peft_type", storage.get_peft_type)
    _wrap(peft.peft_model.PeftModel, "save_pretrained", storage.save_pretrained)
    _wrap(peft.peft_model.PeftModel, "load_adapter", storage.load_adapter)
    _wrap(peft.peft_model, "set_peft_model_state_dict", storage.set_peft_model_state_dict)
    for tuner in (BaseTuner, MixedModel):  # not LoraModel: a mixed model builds and merges LoRA layers too
        _wrap(tuner, "_unload_and_optionally_merge", combining.unload_and_optionally_merge)
    _wrap(BaseTuner, "inject_adapter", injection.inject_adapter)
    _wrap(BaseTuner, "merge_adapter", combining.merge_adapter)
    for kind in (lora_layer.LoraLayer, lora_layer.Embedding, lora_layer._ConvNd):
        _wrap(kind, "update_layer", injection.update_layer)
    _wrap(peft.tuners.lora.LoraModel, "add_weighted_adapter", combining.add_weighted_adapter)
    _wrap(hotswap, "_get_padded_linear", combining.get_padded_linear)
    _wrap(hotswap, "hotswap_adapter_from_state_dict", combining.hotswap_adapter_from_state_dict)
    layers = [peft.tuners.lora.Linear] + [
        getattr(peft.tuners.lora, n) for n in ("Linear4bit", "Linear8bitLt") if hasattr(peft.tuners.lora, n)
    ]
    for layer in layers:
        _wrap(layer, "get_delta_weight", combining.get_delta_weight)
    if hasattr(peft.tuners.lora, "Linear4bit"):
        from peft_safety.registry import forward

        _wrap(peft.tuners.lora.Linear4bit, "forward", forward.linear4bit_forward)


def _wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Replace `owner.name` by `wrapper(original, *args, **kwargs)`, keeping its signature and its being a class
    method.
    """
    found = getattr(owner, name)
    inner = getattr(found, "__func__", found) if isinstance(owner, type) else found

    @functools.wraps(inner)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(inner, *args, **kwargs)

    setattr(owner, name, classmethod(wrapped) if isinstance(owner, type) and hasattr(found, "__self__") else wrapped)


def _symbols() -> dict[str, tuple[str, ...]]:
    """What the canary test checks."""
    return SYMBOLS | (QUANTISED if importlib.util.find_spec("bitsandbytes") else {})


__all__ = ["config_types", "register"]
