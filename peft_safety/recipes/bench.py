"""What a model is measured on, fixed once so that figures before and after can be compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peft_safety.evaluation.evaluate import Evaluation, evaluate, self_responses
from peft_safety.evaluation.prompts import PromptSet, prompt_set
from peft_safety.recipes.load import TaskData
from peft_safety.recipes.train import TrainOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

JUDGED_TOKENS = 16
"""Tokens generated of a response that is judged: a keyword judge needs only its opening."""
GENERAL_TOKENS = 24
"""Tokens of the reference answers behind the general NLL."""


@dataclass(frozen=True)
class Bench:
    """Prompts, task rows and reference answers.

    Attributes:
        prompts: harmful, safe and general prompts of one split.
        task: training and held-out rows.
        general: the model's own answers to the general prompts before fine-tuning; their NLL afterwards is its drift.
        max_length: tokens kept of each row.
        progress: show bars.
    """

    prompts: PromptSet
    task: TaskData
    general: list[dict[str, Any]]
    max_length: int
    progress: bool

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
    ) -> Bench:
        """Draw the prompts of `split` (at most `limit` of each kind) and let `model`, before fine-tuning, answer the
        general ones.
        """
        prompts, progress = prompt_set(split, limit, options.seed), options.progress
        general = self_responses(model, tokenizer, prompts.general, max_new_tokens=GENERAL_TOKENS, progress=progress)
        return cls(prompts, task, general, options.max_length, progress)

    def measure(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Evaluation:
        """Evaluate `model`."""
        return evaluate(
            model,
            tokenizer,
            prompts=self.prompts,
            task=self.task.held_out,
            labels=self.task.labels,
            general=self.general,
            max_new_tokens=JUDGED_TOKENS,
            max_length=self.max_length,
            progress=self.progress,
        )
