"""What a calibration asks of the model itself: no adapters, its name, its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from peft_safety.calibration.batches import is_tokenized
from peft_safety.errors import ConfigError


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Run the base model without its adapters, nor what they trained in whole modules (`modules_to_save`) or token
    rows; all come back unchanged. A ConfigError refuses a merged adapter.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    tuners = [module for module in model.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    if any(module.merged for module in tuners if isinstance(module, BaseTunerLayer)):
        raise ConfigError("an adapter is merged into the base weights. Call unmerge_adapter() before calibrating.")
    trainable = [(p, p.requires_grad) for module in tuners for p in module.parameters()]
    was_off = [module.disable_adapters for module in tuners]
    for module in tuners:
        module.enable_adapters(False)
    try:
        yield
    finally:
        for module, off in zip(tuners, was_off, strict=True):
            module.enable_adapters(not off)
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)


def model_name(model: nn.Module) -> str:
    """Last part of the model's name or path, so that no local path is published."""
    path = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    return path.rstrip("/").rpartition("/")[2]


def tokenizer_for(model: nn.Module, rows: Sequence[Mapping[str, Any]]) -> Any:
    """The tokenizer that these rows need: the model's own, or None for tokenized batches."""
    return None if is_tokenized(rows) else tokenizer_of(model)


def tokenizer_of(model: nn.Module) -> Any:
    """The tokenizer under the model's own name or directory. A ConfigError says that there is none."""
    from transformers import AutoTokenizer

    source = getattr(getattr(model, "config", None), "_name_or_path", "") or ""
    try:
        if not source:
            raise OSError("the model has no name")
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no tokenizer can be loaded for {source or 'the model'!r} ({type(error).__name__}). Calibrate with "
            "peft_safety.calibrate(model, config, tokenizer=...) and set config.subspace."
        ) from error
