"""What is wrapped in PEFT, and every symbol of PEFT that this folder relies on: a canary test checks all of it against
the installed PEFT.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import peft.peft_model
import peft.tuners.lora
from peft import mapping
from peft.config import PeftConfigMixin
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import hotswap as peft_hotswap

from peft_safety.layers import DTYPE_READERS
from peft_safety.methods.base import LAYER_BUILDERS
from peft_safety.registry import configs, hotswap, injection, storage
from peft_safety.registry.types import config_types

SYMBOLS = {
    "peft.mapping": (
        "PEFT_TYPE_TO_CONFIG_MAPPING",
        "PEFT_TYPE_TO_TUNER_MAPPING",
        "PEFT_TYPE_TO_PREFIX_MAPPING",
        "PEFT_TYPE_TO_MIXED_MODEL_MAPPING",
    ),
    "peft.config": ("PeftConfigMixin.from_pretrained", "PeftConfigMixin._get_peft_type"),
    "peft.peft_model": ("PeftModel.save_pretrained", "PeftModel.load_adapter"),
    "peft.tuners.lora": (
        "LoraModel.add_weighted_adapter",
        "Linear.get_delta_weight",
        "LoraLayer.lora_A",
        "LoraLayer.lora_B",
        "LoraLayer._mixed_batch_forward",
        "LoraLayer.update_layer",
    ),
    "peft.tuners.tuners_utils": (
        "BaseTuner._unload_and_optionally_merge",
        "BaseTuner.merge_adapter",
        "BaseTuner.inject_adapter",
        "BaseTunerLayer.get_base_layer",
        "BaseTunerLayer.enable_adapters",
        "BaseTunerLayer.delete_adapter",
        "BaseTunerLayer.frozen_peft_weight_names",
    ),
    "peft.tuners.lora.layer": ("Embedding.update_layer", "_ConvNd.update_layer"),
    "peft.tuners.mixed": ("MixedModel._unload_and_optionally_merge",),
    "peft.import_utils": ("is_bnb_available", "is_bnb_4bit_available"),
    "peft.utils.other": ("transpose", "AuxiliaryTrainingWrapper"),
    "peft.utils.hotswap": ("_get_padded_linear", "hotswap_adapter_from_state_dict"),
}
"""Every PEFT symbol that is read, wrapped or overridden, by module. Instance attributes (`LoraLayer.lora_A`) are
checked on an instance.
"""

QUANTIZED = {
    "peft.tuners.lora.bnb": ("Linear4bit.forward", "Linear4bit.get_delta_weight", "Linear8bitLt.get_delta_weight")
}
"""The same, where bitsandbytes is installed."""

WRAPS: tuple[tuple[Any, str, Callable[..., Any]], ...] = (
    (PeftConfigMixin, "from_pretrained", configs.config_from_pretrained),
    (PeftConfigMixin, "_get_peft_type", configs.get_peft_type),
    (peft.peft_model.PeftModel, "save_pretrained", storage.save_pretrained),
    (peft.peft_model.PeftModel, "load_adapter", storage.load_adapter),
    (BaseTuner, "inject_adapter", injection.inject_adapter),
    (peft_hotswap, "_get_padded_linear", hotswap.get_padded_linear),
    (peft_hotswap, "hotswap_adapter_from_state_dict", hotswap.hotswap_adapter_from_state_dict),
)
"""What is wrapped, all of it: owner, name, and the function that gets the original as its first argument."""

_done = False


def register() -> None:
    """Make PEFT know the protected types. Called once, when `peft_safety` and `peft` are both imported; calling it
    again does nothing.
    """
    global _done  # noqa: PLW0603
    if _done:
        return
    _done = True
    register_types()
    for row in WRAPS:
        _wrap(*row)
    _name_readers(peft.tuners.lora.LoraLayer)


def register_types() -> None:
    """Enter the methods into PEFT's tables, each as a kind of LoRA."""
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


def _name_readers(layer: type) -> None:
    """Tell what the functions of PEFT's layers are, `layer` and all below it: forwards read `lora_A.weight` for its
    dtype and nothing else, and `update_layer` makes factors.
    """
    for names, readers in ((("forward", "_mixed_batch_forward"), DTYPE_READERS), (("update_layer",), LAYER_BUILDERS)):
        readers.update(inspect.unwrap(vars(layer)[name]).__code__ for name in names if name in vars(layer))
    kinds: list[type] = layer.__subclasses__()
    for kind in kinds:
        _name_readers(kind)


def _wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Replace `owner.name` by `wrapper(original, *args, **kwargs)`, keeping its signature and its being a class
    method.
    """
    original = getattr(owner, name)
    inner = getattr(original, "__func__", original) if isinstance(owner, type) else original

    @functools.wraps(inner)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(inner, *args, **kwargs)

    is_class_method = isinstance(owner, type) and hasattr(original, "__self__")
    setattr(owner, name, classmethod(wrapped) if is_class_method else wrapped)
