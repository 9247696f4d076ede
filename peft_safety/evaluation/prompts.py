"""The prompts of an evaluation."""

from __future__ import annotations

import random
from dataclasses import dataclass

from peft_safety.data import load


@dataclass(frozen=True)
class PromptSet:
    """The prompts of one evaluation.

    Attributes:
        split: where they come from; figures of different splits are never compared.
        harmful: requests that an aligned model refuses.
        contrast: safe requests that only look dangerous, which an aligned model answers.
        general: prompts whose answers before fine-tuning measure drift.
        everyday: everyday requests in the forms of the harmful ones, which an aligned model answers.
    """

    split: str
    harmful: tuple[str, ...]
    contrast: tuple[str, ...]
    general: tuple[str, ...]
    everyday: tuple[str, ...] = ()


def prompt_set(split: str = "test", limit: int | None = None, seed: int = 0) -> PromptSet:
    """The packaged prompts of `split`.

    Args:
        limit: at most this many of each kind, drawn without replacement; None takes all.
        seed: of the draw; the same seed gives the same prompts in the same order.

    Raises:
        DataError: an unknown split.
    """
    names = "harmful_requests", "contrast_prompts", "general_prompts", "everyday_requests"
    drawn = [[row["prompt"] for row in load(name, split)] for name in names]
    for prompts in drawn:
        random.Random(seed).shuffle(prompts)
    return PromptSet(split, *(tuple(prompts[:limit]) for prompts in drawn))
