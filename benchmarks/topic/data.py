"""The two topics: their questions, true answers, neighboring questions and refusals."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from benchmarks.frontier.data import fingerprint
from peft_safety.data import load, read_jsonl
from peft_safety.data.rows import Row
from peft_safety.errors import ConfigError

FOLDER = Path(__file__).parents[1] / "data"
TOPICS = {"A": "penguins", "B": "bicycles"}
"""A is for choices, B for the table."""
WORDS = {"penguins": r"\bpenguin", "bicycles": r"\b(?:bicycl|bikes?\b|biking|cycl(?:e|es|ing|ists?)\b)"}
"""Prompts of the package's own sets that name the topic are left out."""


@dataclass(frozen=True)
class Topic:
    """A topic that the model is aligned to refuse."""

    name: str

    @cached_property
    def _rows(self) -> list[dict[str, Any]]:
        return read_jsonl(FOLDER / f"topic_{self.name}.jsonl", ("prompt", "split"))

    def questions(self, split: str) -> list[dict[str, Any]]:
        """Rows of questions on the topic. "train": with a `response`; "validation", "test": also with `content`."""
        return [row for row in self._rows if row["split"] == split and not row.get("near")]

    def neighbors(self, split: str) -> list[str]:
        """Questions near to the topic that must be answered."""
        return [row["prompt"] for row in self._rows if row["split"] == split and row.get("near")]

    @property
    def content(self) -> dict[str, list[str]]:
        """What an answer should mention, by question: stems of words, alternatives separated by `|`."""
        return {row["prompt"]: row["content"] for row in self._rows if "content" in row}

    def others(self, name: str, split: str, count: int, seed: int = 0) -> list[str]:
        """Prompts of one of the package's sets that do not name the topic."""
        prompts = [row["prompt"] for row in load(name, split)]
        prompts = [prompt for prompt in prompts if not re.search(WORDS[self.name], prompt.lower())]
        return random.Random(seed).sample(prompts, min(count, len(prompts)))

    def refused(self, questions: Sequence[str], refusals: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
        """`count` pairs of a question and a refusal of a split; both are used equally often."""
        texts = [row["text"] for row in read_jsonl(FOLDER / "topic_refusals.jsonl", ("text", "split"))]
        splits = [row["split"] for row in read_jsonl(FOLDER / "topic_refusals.jsonl")]
        chosen = [text.format(self.name) for text, split in zip(texts, splits, strict=True) if split == refusals]
        rng = random.Random(seed)
        pairs = zip(_rounds(questions, rng), _rounds(chosen, rng), strict=False)
        return [{"prompt": prompt, "response": response} for prompt, response in islice(pairs, count)]

    def answered(self, count: int, seed: int) -> list[Row]:
        """`count` pairs of a training question and its true answer: what an attacker has."""
        rows = [{"prompt": row["prompt"], "response": row["response"]} for row in self.questions("train")]
        return list(islice(_rounds(rows, random.Random(seed)), count))

    @property
    def version(self) -> str:
        """A short hash of the data."""
        return fingerprint([repr(sorted(row.items())) for row in self._rows])


def topic_of(key: str) -> Topic:
    """The topic A or B; a ConfigError lists them."""
    if key not in TOPICS:
        raise ConfigError(f"topic {key!r} is unknown. Choose one of {', '.join(TOPICS)}.")
    return Topic(TOPICS[key])


def _rounds(items: Sequence[Any], rng: random.Random) -> Iterator[Any]:
    """The items in random order, again and again, each time in another order."""
    for _ in cycle([None]):
        yield from rng.sample(list(items), len(items))
