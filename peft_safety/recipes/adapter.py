"""Which adapter is trained: the config of a method, and what it reads of the task."""

from __future__ import annotations

import copy
from dataclasses import fields
from typing import Any

from peft import LoraConfig, TaskType
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_safety.calibration.batches import to_batches
from peft_safety.calibration.estimators import SafetySubspace
from peft_safety.data import calibration_rows
from peft_safety.errors import ConfigError
from peft_safety.methods.guardspace import GuardSpaceConfig
from peft_safety.methods.salora import SaLoRAConfig

TASK_ROWS = 128
"""Training rows that an adapter is made with, in batches of 8."""
GUARD_BATCHES = 4
"""Of these, what GuardSpace looks at: thousands of tokens are enough."""


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


def with_task(
    config: LoraConfig,
    model: PreTrainedModel,
    batches: list[dict[str, Any]],
    *,
    tokenizer: PreTrainedTokenizerBase,
    seed: int = 0,
    progress: bool = True,
) -> LoraConfig:
    """The config with the data that its method reads when the adapter is injected: the task's, from `batches` of
    training rows, and the package's prompts, both in tokens of `tokenizer`.
    """
    config = copy.copy(config)
    if isinstance(config, SaLoRAConfig) and config.init == "task" and config.task_data is None:
        how: dict[str, Any] = {"target_modules": config.target_modules, "allow_fewer": True, "seed": seed}
        config.task_data = SafetySubspace.from_activations(
            model, batches, rank=config.task_rank, progress=progress, **how
        )
    elif isinstance(config, GuardSpaceConfig):
        if config.init == "guardspace" and config.init_data is None:
            rows = calibration_rows("guardspace", config.basis)
            config.init_data = to_batches(rows, tokenizer, batch_size=8, max_length=512)[0]
        if config.task_data is None:
            config.task_data = batches[:GUARD_BATCHES]
    return config
