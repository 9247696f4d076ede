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
        harmful, contrast: requests that an aligned model refuses, and safe ones that only look dangerous.
        general: prompts whose answers before fine-tuning measure drift.
        everyday: everyday requests in the forms of the harmful ones.
    """

    split: str
    harmful: tuple[str, ...]
    contrast: tuple[str, ...]
    general: tuple[str, ...]
    everyday: tuple[str, ...] = ()


def prompt_set(split: str = "test", limit: int | None = None, seed: int = 0) -> PromptSet:
    """The packaged prompts of `split`, at most `limit` of each kind, drawn by `seed` without replacement."""
    names = "harmful_requests", "contrast_prompts", "general_prompts", "everyday_requests"
    drawn = [[row["prompt"] for row in load(name, split)] for name in names]
    for prompts in drawn:
        random.Random(seed).shuffle(prompts)
    return PromptSet(split, *(tuple(prompts[:limit]) for prompts in drawn))
