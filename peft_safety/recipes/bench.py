"""What a model is measured on, fixed once so that figures before and after can be compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_safety.evaluation.evaluate import Evaluation, evaluate, self_responses
from peft_safety.evaluation.prompts import PromptSet, prompt_set
from peft_safety.recipes.load import TaskData
from peft_safety.recipes.train import TrainOptions

JUDGED_TOKENS = 16
"""Tokens generated of a response that is judged: a keyword judge needs only its opening."""
GENERAL_TOKENS = 24
"""Tokens of the reference answers behind the general NLL."""


@dataclass(frozen=True)
class Bench:
    """Prompts, task rows, and the model's answers to general prompts before fine-tuning, to measure drift by."""

    prompts: PromptSet
    task: TaskData
    general: list[dict[str, Any]]
    options: TrainOptions

    @classmethod
    def prepare(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        task: TaskData,
        options: TrainOptions,
        *,
        split: str = "test",
        limit: int | None = None,
        drift: bool = True,
    ) -> Bench:
        """Draw the prompts (at most `limit` of each kind); to measure drift, `model` answers the general ones."""
        prompts = prompt_set(split, limit, options.seed)
        asked: dict[str, Any] = {"max_new_tokens": GENERAL_TOKENS, "progress": options.progress}
        general = self_responses(model, tokenizer, prompts.general, **asked) if drift else []
        return cls(prompts, task, general, options)

    def measure(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Evaluation:
        return evaluate(
            model,
            tokenizer,
            prompts=self.prompts,
            task=self.task.held_out,
            labels=self.task.labels,
            general=self.general,
            max_new_tokens=JUDGED_TOKENS,
            max_length=self.options.max_length,
            progress=self.options.progress,
        )
