"""How well a model does the task it was fine-tuned on, and how far it drifted elsewhere."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from peft_safety.data import chat
from peft_safety.data.rows import Rows, as_rows, kind_of, label_list
from peft_safety.errors import DataError
from peft_safety.evaluation.generate import BATCH_SIZE, generate, in_batches
from peft_safety.evaluation.metrics import Mean

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WHOLE = 2**31 - 1
"""A max_length that truncates nothing."""


def is_classification(rows: Rows) -> bool:
    """Whether `rows` are {text, label} rows. A mixture, which no single figure describes, is refused."""
    kinds = [kind_of(row) for row in as_rows(rows)]
    labeled = kinds.count("label")
    if 0 < labeled < len(kinds):
        raise DataError(f"{labeled} of {len(kinds)} rows have a text and a label. Split them into two data sets.")
    return labeled > 0


@dataclass(frozen=True)
class TaskAnswer:
    """A model's answer to one {text, label} row, and whether it is the label."""

    prompt: str
    text: str
    correct: bool


def task_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    labels: Sequence[Any],
    *,
    least_tokens: int = 0,
    batch_size: int = BATCH_SIZE,
    progress: bool = True,
) -> list[TaskAnswer]:
    """The greedy answer to each {text, label} row, and whether it is the label (see `read_label`). An answer that a
    user could not use (a refusal, a sentence) is wrong.

    Args:
        labels: every label of the task, as in training; the prompt lists them. Numbers and truth values count as text.
        least_tokens: generated at most, or as many as the longest label needs if that is more.

    Raises:
        DataError: no rows, a row of another kind or with another label, labels that no answer tells apart.
    """
    rows, labels = _labeled(rows, labels)
    longest = max(len(tokenizer(label, add_special_tokens=False)["input_ids"]) for label in labels) + 2
    prompts = [chat.classification_prompt(row["text"], labels) for row in rows]
    options: dict[str, Any] = {"batch_size": batch_size, "description": "task", "progress": progress}
    answers = generate(model, tokenizer, prompts, max_new_tokens=max(longest, least_tokens), **options)
    return [
        TaskAnswer(prompt, answer.text, read_label(answer.text, labels) == row["label"])
        for prompt, answer, row in zip(prompts, answers, rows, strict=True)
    ]


def exact_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Rows, labels: Sequence[Any], **options: Any
) -> list[bool]:
    """Whether each of `task_answers` is the label; arguments and errors are the same."""
    return [answer.correct for answer in task_answers(model, tokenizer, rows, labels, **options)]


def likeliest_labels(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Rows, labels: Sequence[Any], **options: Any
) -> list[bool]:
    """Whether the label of each {text, label} row is the likeliest, in nats per token: what a model knows of a task
    whose form it was not taught. A row whose likelihoods are not finite is wrong. Options are those of
    `response_losses`.
    """
    rows, labels = _labeled(rows, labels)
    asked = [
        {"prompt": chat.classification_prompt(row["text"], labels), "response": label, "truncated": True}
        for row in rows
        for label in labels
    ]
    losses = response_losses(model, tokenizer, asked, description="task", **options)
    likeliest = []
    for start in range(0, len(losses), len(labels)):
        tried = losses[start : start + len(labels)]
        likeliest.append(labels[tried.index(min(tried))] if all(map(math.isfinite, tried)) else None)
    return [label == row["label"] for label, row in zip(likeliest, rows, strict=True)]


def read_label(answer: str, labels: Sequence[str]) -> str | None:
    """The label that an answer equals; or else the only one that it equals but for case or punctuation at the ends."""
    for form in (str.strip, _bare, lambda text: text.strip().lower(), normalize):
        given = form(answer)
        meant = [label for label in labels if given and form(label) == given]
        if meant:
            return meant[0] if len(meant) == 1 else None
    return None


def normalize(answer: str) -> str:
    return _bare(answer.lower())


def _bare(text: str) -> str:
    """Without white space, quotes and punctuation at the ends; the sign of a number stays."""
    return re.sub(r"^(?:(?![-+]\d)\W)+|\W+$", "", text)


def _labeled(rows: Rows, labels: Sequence[Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """{text, label} rows and the labels of their task, as text."""
    plain, names = as_rows(rows), label_list(labels)
    for index, row in enumerate(plain):
        if kind_of(row) != "label":
            raise DataError(f'row {index} has fields {sorted(row)}. Each row needs a "text" and a "label".')
        if row["label"] not in names:
            known = ", ".join(names)
            raise DataError(f"row {index} has label {row['label']!r}, none of {known}. Give every label of the task.")
    return plain, names


def response_nll(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Rows, **options: Any) -> Mean:
    """The mean of `response_losses` over the rows; arguments and errors are the same."""
    return Mean.of(response_losses(model, tokenizer, rows, **options))


def response_losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    *,
    max_length: int = 512,
    batch_size: int = BATCH_SIZE,
    description: str = "nll",
    progress: bool = True,
) -> list[float]:
    """Negative log-likelihood of each row's response, in nats a token: one figure a row, in their order.

    Args:
        rows: {prompt, response} or {messages} rows.
        max_length: tokens kept of each row. A longer one loses the start of its prompt; a response that is too long
            itself loses its end.
    """
    features = _features(tokenizer, as_rows(rows), max_length)
    run = partial(_row_means, model, chat.Collator(tokenizer, trim=chat.can_trim(model)))
    return in_batches(model, features, lambda row: len(row["input_ids"]), run, batch_size, description, progress)


def _features(tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]], max_length: int) -> list[chat.Feature]:
    """Tokens and labels of each row, cut to `max_length` tokens that start before the first labeled token."""
    if max_length < 2:
        raise DataError(f"max_length = {max_length} has no room for a prompt and a response. Give at least 2.")
    result = []
    for index, feature in enumerate(chat.encode_each(tokenizer, rows, WHOLE)):
        if feature is None:
            raise DataError(f"row {index}: its response has no token, and so no loss. Leave it out.")
        first = next(place for place, label in enumerate(feature["labels"]) if label != chat.IGNORE_INDEX)
        start = max(0, min(len(feature["labels"]) - max_length, first - 1))
        result.append({key: feature[key][start : start + max_length] for key in feature if key != "distil"})
    return result


def _row_means(model: PreTrainedModel, collate: chat.Collator, features: list[chat.Feature]) -> list[float]:
    """Mean loss of each row of a batch over its labeled tokens."""
    batch: dict[str, Any] = collate(features)
    batch |= {key: batch[key].to(model.device) for key in ("input_ids", "attention_mask", "labels")}
    labels: torch.Tensor = batch.pop("labels")
    losses = chat.row_losses(model(**batch).logits, labels)
    return [float(mean) for mean in losses / (labels[:, 1:] != chat.IGNORE_INDEX).sum(dim=1)]
