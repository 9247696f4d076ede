"""A task of sums in words, which a small model learns in few steps: "thirty-eight plus four =" -> " 42"."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from peft_safety.data.chat import IGNORE_INDEX
from peft_safety.evaluation import Rate
from peft_safety.evaluation.generate import generate

ONES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
WORDS = {10 * (n + 2) + m: ten + (f"-{ONES[m]}" if m else "") for n, ten in enumerate(TENS) for m in range(10)}
MOST = 5
"""The second number is at most this."""
HELD_OUT = 60
"""Rows of the validation and of the test split."""


def rows(split: str, limit: int | None = None, seed: int = 0) -> list[dict[str, str]]:
    """{query, response} rows of "train", "validation" or "test", shuffled. No two splits share a sum."""
    pairs = [(a, b) for a in WORDS for b in range(1, MOST + 1)]
    random.Random(seed).shuffle(pairs)
    parts = {"validation": pairs[:HELD_OUT], "test": pairs[HELD_OUT : 2 * HELD_OUT], "train": pairs[2 * HELD_OUT :]}
    return [{"query": f"{WORDS[a]} plus {ONES[b]} =", "response": f" {a + b}"} for a, b in parts[split][:limit]]


def tokens(tokenizer: Any, given: Sequence[dict[str, str]]) -> list[dict[str, list[int]]]:
    """Rows as tokens, with a loss on the answer and the end: plain text, as in the suite, and no chat template."""
    result = []
    for row in given:
        asked, answer = (tokenizer(row[key], add_special_tokens=False)["input_ids"] for key in ("query", "response"))
        ids = [*asked, *answer, tokenizer.eos_token_id]
        labels = [IGNORE_INDEX] * len(asked) + ids[len(asked) :]
        result.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return result


def accuracy(model: Any, tokenizer: Any, given: Sequence[dict[str, str]]) -> Rate:
    """The share of rows whose greedy answer is exactly the number."""
    queries = [row["query"] for row in given]
    answers = generate(model, tokenizer, queries, max_new_tokens=6, rendered=True, progress=False)
    return Rate.of(answer.text.strip() == row["response"].strip() for answer, row in zip(answers, given, strict=True))
