"""What is wrapped in PEFT. tests/interop/test_canary.py checks all of PEFT that this folder uses."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import peft.peft_model
import peft.tuners.lora
from peft import mapping
from peft.config import PeftConfigMixin
from peft.tuners.lora.variants import ALoraLinearVariant
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import hotswap as peft_hotswap

from peft_safety.layers.protected_linear import DTYPE_READERS
from peft_safety.methods.base import LAYER_BUILDERS
from peft_safety.registry import configs, hotswap, injection, storage
from peft_safety.registry.types import config_types

WRAPS: tuple[tuple[Any, str, Callable[..., Any]], ...] = (
    (PeftConfigMixin, "from_pretrained", configs.config_from_pretrained),
    (PeftConfigMixin, "_get_peft_type", configs.get_peft_type),
    (peft.peft_model.PeftModel, "save_pretrained", storage.save_pretrained),
    (peft.peft_model.PeftModel, "load_adapter", storage.load_adapter),
    (BaseTuner, "inject_adapter", injection.inject_adapter),
    (peft_hotswap, "_pad_lora_weights", hotswap.pad_lora_weights),
    (peft_hotswap, "hotswap_adapter_from_state_dict", hotswap.hotswap_adapter_from_state_dict),
)
"""Everything that is wrapped: owner, name, and the function that gets the original as its first argument."""


@functools.cache
def register() -> None:
    """Make PEFT know the protected types, once, when `peft_safety` and `peft` are both imported."""
    register_types()
    for row in WRAPS:
        _wrap(*row)
    _name_readers(peft.tuners.lora.LoraLayer)
    DTYPE_READERS.add(ALoraLinearVariant.forward.__code__)


def register_types() -> None:
    """Enter the methods into PEFT's tables, each as a kind of LoRA."""
    for name, cls in config_types().items():
        mapping.PEFT_TYPE_TO_CONFIG_MAPPING[name] = cls
        mapping.PEFT_TYPE_TO_TUNER_MAPPING[name] = peft.tuners.lora.LoraModel
        mapping.PEFT_TYPE_TO_PREFIX_MAPPING[name] = "lora_"
        mapping.PEFT_TYPE_TO_MIXED_MODEL_MAPPING[name] = peft.tuners.lora.LoraModel


def _name_readers(layer: type) -> None:
    """Register the forwards, which read only the dtype of `lora_A.weight`, and `update_layer`, which makes factors."""
    for names, readers in ((("forward", "_mixed_batch_forward"), DTYPE_READERS), (("update_layer",), LAYER_BUILDERS)):
        readers.update(inspect.unwrap(vars(layer)[name]).__code__ for name in names if name in vars(layer))
    kinds: list[type] = layer.__subclasses__()
    for kind in kinds:
        _name_readers(kind)


def _wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Replace `owner.name` by `wrapper(original, *args, **kwargs)`, with the same signature."""
    original = getattr(owner, name)
    inner = getattr(original, "__func__", original) if isinstance(owner, type) else original

    @functools.wraps(inner)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(inner, *args, **kwargs)

    is_class_method = isinstance(owner, type) and hasattr(original, "__self__")
    setattr(owner, name, classmethod(wrapped) if is_class_method else wrapped)
