"""A plain refusal patch: LoRA on refusals, with enough safe prompts beside them that the model still answers what only looks dangerous."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from peft_safety.data import load, refusal_pairs
from peft_safety.evaluation.evaluate import self_responses
from peft_safety.recipes.train import TrainingRun, TrainOptions, finetune

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ALIGN_RANK = 8
ALIGN_ALPHA = 16
ALIGN_OPTIONS = TrainOptions(lr=1.5e-3, max_length=128)


def align(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    options: TrainOptions = ALIGN_OPTIONS,
    *,
    harmful: int = 224,
    general: int = 20,
    contrast: int = 105,
    answer_tokens: int = 16,
) -> tuple[PeftModel, TrainingRun]:
    """Train a refusal patch on the package's training split; `merge_and_unload()` the result to get an aligned model.

    The defaults were chosen on the validation split with SmolLM2-135M-Instruct. More contrast rows lower over-refusal, and refusal with it.

    Args:
        harmful: harmful requests with refusals; past the split's size they repeat, with other refusals.
        general: everyday prompts answered by the model itself.
        contrast: safe prompts that look dangerous, answered by the model itself; past the split's size they repeat.
        answer_tokens: of the model's own answers, which are cut there and then not taught to end.

    Returns:
        The model under a LoRA adapter of rank 8 on every linear layer, and what the run cost.
    """
    from peft import LoraConfig, TaskType

    rows: list[dict[str, Any]] = [*refusal_pairs("train", harmful, options.seed)]
    wanted = [row["prompt"] for name, count in (("general_prompts", general), ("contrast_prompts", contrast)) for row in _repeat(load(name, "train"), count)]
    if wanted:
        distinct = list(dict.fromkeys(wanted))
        answers = {row["prompt"]: row for row in self_responses(model, tokenizer, distinct, max_new_tokens=answer_tokens, progress=options.progress)}
        rows += [answers[prompt] for prompt in wanted if prompt in answers]
    random.Random(options.seed).shuffle(rows)
    config = LoraConfig(r=ALIGN_RANK, lora_alpha=ALIGN_ALPHA, target_modules="all-linear", task_type=TaskType.CAUSAL_LM)
    return finetune(model, tokenizer, rows, config, options, description="refusal patch")


def _repeat(rows: list[dict[str, str]], count: int) -> list[dict[str, str]]:
    """The first `count` of `rows`, `rows`, `rows`, ..."""
    return [rows[index % len(rows)] for index in range(count)]
