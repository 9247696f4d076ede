"""Which adapter is trained: the config of a method, and its subspace estimated on the model at hand."""

from __future__ import annotations

import copy
from dataclasses import fields
from typing import Any

from peft import LoraConfig, TaskType
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_safety.calibration.estimators import SafetySubspace
from peft_safety.calibration.moments import to_batches
from peft_safety.data import CALIBRATION_PAIRS, calibration_rows
from peft_safety.data.rows import Rows, as_rows
from peft_safety.errors import ConfigError
from peft_safety.methods.base import calibrate
from peft_safety.methods.guardspace import GuardSpaceConfig
from peft_safety.methods.salora import SaLoRAConfig

GUARD_ROWS = 32
"""Training rows that GuardSpace's guard against stalling looks at: thousands of tokens."""


def adapter_config(
    method: str = "guardspace",
    *,
    r: int = 16,
    lora_alpha: int = 16,
    target_modules: str | list[str] = "all-linear",
    **options: Any,
) -> LoraConfig:
    """The PEFT config of a method: "lora" (not protected), "salora" or "guardspace", whose A is frozen unless `train`
    or another option says otherwise. Options are further fields of the config; None means its default.
    """
    kinds: dict[str, Any] = {"lora": LoraConfig, "salora": SaLoRAConfig, "guardspace": GuardSpaceConfig}
    if method not in kinds:
        raise ConfigError(f"method {method!r} is unknown. Choose 'lora', 'salora' or 'guardspace'.")
    given = {name: value for name, value in options.items() if value is not None}
    unknown = sorted(set(given) - {field.name for field in fields(kinds[method])})
    if unknown:
        raise ConfigError(f"method {method!r} has no option {unknown[0]!r}. Leave it out, or choose another method.")
    if method == "guardspace" and not {"init", "combine"} & set(given):
        given.setdefault("train", "B")
    given |= {"r": r, "lora_alpha": lora_alpha, "target_modules": target_modules, "task_type": TaskType.CAUSAL_LM}
    config: LoraConfig = kinds[method](**given)
    return config


def calibrated(
    config: LoraConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    *,
    seed: int = 0,
    progress: bool = True,
) -> LoraConfig:
    """The config with everything estimated that it would otherwise estimate at injection, so that `model` and
    `tokenizer` are the ones at hand. The first 128 training rows give the task subspace of SaLoRA's `init="task"`, the
    first 32 are for GuardSpace. Other configs than those of `adapter_config` are returned as they are.
    """
    config, rows = copy.copy(config), as_rows(rows)
    common: dict[str, Any] = {"tokenizer": tokenizer, "seed": seed, "progress": progress}
    reading: dict[str, Any] = {"tokenizer": tokenizer, "batch_size": 8, "max_length": 512}
    if isinstance(config, (SaLoRAConfig, GuardSpaceConfig)) and config.subspace == "auto":
        config.subspace = calibrate(model, config, **common)
    if isinstance(config, SaLoRAConfig) and config.init == "task" and config.task_data is None:
        common |= {"target_modules": config.target_modules, "allow_fewer": True}
        task = rows[:CALIBRATION_PAIRS]
        config.task_data = SafetySubspace.from_activations(model, task, rank=config.task_rank, **common)
    elif isinstance(config, GuardSpaceConfig):
        if config.init == "guardspace" and config.init_data is None:
            config.init_data = to_batches(calibration_rows("guardspace", config.basis), **reading)[0]
        if config.task_data is None:
            config.task_data = to_batches(rows[:GUARD_ROWS], **reading)[0]
    return config
