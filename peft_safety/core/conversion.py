"""Checkpoints whose weights have other names than the model: transformers renames them while it loads."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch


def model_keys(directory: Path, keys: Iterable[str]) -> dict[str, str]:
    """`{key in the file: key in the model}` as transformers would load them. Empty where it knows no such
    architecture; no code of the checkpoint is run.

    Weights that are fused or split on the way are left out.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:
        return {}  # transformers 4 keeps the names
    model = _skeleton(directory)
    if model is None:
        return {}
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    others: list[Any] = [transform for transform in transforms if not isinstance(transform, WeightRenaming)]
    state = model.state_dict()
    renamed = {key: rename_source_key(key, renamings, others, model.base_model_prefix, state) for key in keys}
    return {key: name for key, (name, fused) in renamed.items() if fused is None}


def _skeleton(directory: Path) -> Any:
    """The model of a checkpoint without its weights, or None."""
    import transformers

    if not (directory / "config.json").is_file():
        return None
    try:
        config = transformers.AutoConfig.from_pretrained(str(directory), trust_remote_code=False)
        kind = getattr(transformers, (config.architectures or [""])[0], None)
        if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
            return None
        with torch.device("meta"):
            return kind(config)
    except (ValueError, TypeError, KeyError, AttributeError, OSError, RuntimeError):
        return None  # a config that transformers cannot build: the names stay as they are
