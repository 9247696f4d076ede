"""How well a model does the task it was fine-tuned on, and how far it drifted elsewhere."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peft_safety.data.chat import IGNORE_INDEX, Collator, can_trim, classification_prompt, encode_each
from peft_safety.data.rows import Rows, as_rows, kind_of, label_list
from peft_safety.errors import DataError
from peft_safety.evaluation.generate import BATCH_SIZE, generate, inference
from peft_safety.evaluation.metrics import Mean, Rate

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WHOLE = 2**31 - 1
"""A max_length that truncates nothing."""


def is_classification(rows: Rows) -> bool:
    """Whether `rows` are {text, label} rows.

    Raises:
        DataError: some are and some are not, so that no single figure describes them.
    """
    kinds = [kind_of(row) for row in as_rows(rows)]
    labeled = kinds.count("label")
    if 0 < labeled < len(kinds):
        raise DataError(
            f"{labeled} of {len(kinds)} rows have a text and a label, the others do not. Split them into two data "
            "sets."
        )
    return labeled > 0


def accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Rows, labels: Sequence[Any], **options: Any
) -> Rate:
    """Share of {text, label} rows whose greedy answer is the label: the rate of `exact_answers`, which has the
    arguments and the errors.
    """
    return Rate.of(exact_answers(model, tokenizer, rows, labels, **options))


def exact_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    labels: Sequence[Any],
    *,
    batch_size: int = BATCH_SIZE,
    progress: bool = True,
) -> list[bool]:
    """Whether the greedy answer to each {text, label} row is the label (see `read_label`).

    One short generation per row, however many labels there are. An answer that a user could not use (a refusal, a
    sentence) is wrong.

    Args:
        labels: every label of the task, as in training; the prompt lists them. Numbers and truth values count as text.

    Raises:
        DataError: no rows, a row of another kind or with another label, labels that no answer tells apart.
    """
    answers = task_answers(model, tokenizer, rows, labels, batch_size=batch_size, progress=progress)
    return [answer.correct for answer in answers]


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
    """`exact_answers` with the answers themselves.

    Args:
        least_tokens: generated at most, or as many as the longest label needs if that is more; a judge of refusals
            needs more than a label has.
    """
    rows, labels = _labeled(rows, labels)
    longest = max(len(tokenizer(label, add_special_tokens=False)["input_ids"]) for label in labels) + 2
    prompts = [classification_prompt(row["text"], labels) for row in rows]
    budget = max(longest, least_tokens)
    answers = generate(
        model, tokenizer, prompts, max_new_tokens=budget, batch_size=batch_size, description="task", progress=progress
    )
    return [
        TaskAnswer(prompt, answer.text, read_label(answer.text, labels) == row["label"])
        for prompt, answer, row in zip(prompts, answers, rows, strict=True)
    ]


def choice_accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Rows, labels: Sequence[Any], **options: Any
) -> Rate:
    """Share of {text, label} rows whose label is the likeliest: the rate of `likeliest_labels`, which has the
    arguments and the errors.
    """
    return Rate.of(likeliest_labels(model, tokenizer, rows, labels, **options))


def likeliest_labels(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    labels: Sequence[Any],
    *,
    batch_size: int = BATCH_SIZE,
    progress: bool = True,
) -> list[bool]:
    """Whether the label of each {text, label} row is the likeliest, in nats per token: what a model knows of a task
    whose form it was not taught. A row whose likelihoods are not finite is wrong.

    Args:
        labels: every label of the task; each is tried for each row.
    """
    rows, labels = _labeled(rows, labels)
    asked = [
        {"prompt": classification_prompt(row["text"], labels), "response": label, "truncated": True}
        for row in rows
        for label in labels
    ]
    losses = response_losses(model, tokenizer, asked, batch_size=batch_size, description="task", progress=progress)
    by_row = [losses[start : start + len(labels)] for start in range(0, len(losses), len(labels))]
    return [
        all(map(math.isfinite, options)) and labels[options.index(min(options))] == row["label"]
        for options, row in zip(by_row, rows, strict=True)
    ]


def read_label(answer: str, labels: Sequence[str]) -> str | None:
    """The label that an answer gives: the one it equals; or else the only one that it equals without punctuation at
    the ends, without case, without both.

    None where it gives none, or where labels that differ in these alone leave it open which.
    """
    for form in (str.strip, _bare, lambda text: text.strip().lower(), normalize):
        given = form(answer)
        meant = [label for label in labels if given and form(label) == given]
        if meant:
            return meant[0] if len(meant) == 1 else None
    return None


def normalize(answer: str) -> str:
    """Lower case, without white space, quotes and punctuation at the ends."""
    return _bare(answer.lower())


def _bare(text: str) -> str:
    """Without white space, quotes and punctuation at the ends; the sign of a number stays."""
    return re.sub(r"^(?:(?![-+]\d)\W)+|\W+$", "", text)


def _labeled(rows: Rows, labels: Sequence[Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """{text, label} rows and the labels of their task, as text.

    Raises:
        DataError: see `exact_answers`.
    """
    plain, names = as_rows(rows), label_list(labels)
    for index, row in enumerate(plain):
        if kind_of(row) != "label":
            raise DataError(f'row {index} has fields {sorted(row)}. Each row needs a "text" and a "label".')
        if row["label"] not in names:
            raise DataError(
                f"row {index} has label {row['label']!r}, and the labels are {', '.join(names)}. Give every label of "
                "the task."
            )
    return plain, names


def response_nll(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    *,
    max_length: int = 512,
    batch_size: int = BATCH_SIZE,
    description: str = "nll",
    progress: bool = True,
) -> Mean:
    """Negative log-likelihood of the responses, in nats a token, averaged within each row and then over the rows.

    Args:
        rows: {prompt, response} or {messages} rows.
        max_length: tokens kept of each row; see `response_losses`.
    """
    return Mean.of(
        response_losses(
            model,
            tokenizer,
            rows,
            max_length=max_length,
            batch_size=batch_size,
            description=description,
            progress=progress,
        )
    )


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
    """`response_nll` of each row, in the order of `rows`: one figure a row.

    A row of more than `max_length` tokens loses the start of its prompt, so that its response is measured; a response
    that is too long itself loses its end.

    Raises:
        DataError: a malformed row; its index is named.
    """
    import torch
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    features = _features(tokenizer, as_rows(rows), max_length)
    order = sorted(range(len(features)), key=lambda index: len(features[index]["input_ids"]))
    collate, means = Collator(tokenizer, trim=can_trim(model)), [0.0] * len(features)
    with (
        tqdm(total=len(features), desc=description, unit="row", disable=not progress, leave=False) as bar,
        inference(model),
        torch.inference_mode(),
    ):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = {
                key: value.to(model.device) if isinstance(value, torch.Tensor) else value
                for key, value in collate([features[i] for i in chosen]).items()
            }
            labels = batch.pop("labels")
            for index, mean in zip(chosen, _row_means(model(**batch).logits, labels), strict=True):
                means[index] = mean
            bar.update(len(chosen))
    return means


def _features(tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]], max_length: int) -> list[dict[str, Any]]:
    """Tokens and labels of each row, cut to `max_length` tokens that start before the first labeled token."""
    if max_length < 2:
        raise DataError(f"max_length = {max_length} has no room for a prompt and a response. Give at least 2.")
    result = []
    for index, feature in enumerate(encode_each(tokenizer, rows, WHOLE)):
        if feature is None:
            raise DataError(f"row {index}: its response has no token, and so no loss. Leave it out.")
        first = next(place for place, label in enumerate(feature["labels"]) if label != IGNORE_INDEX)
        start = max(0, min(len(feature["labels"]) - max_length, first - 1))
        result.append(
            {
                key: value[start : start + max_length] if isinstance(value, list) else value
                for key, value in feature.items()
            }
        )
    return result


def _row_means(logits: torch.Tensor, labels: torch.Tensor) -> list[float]:
    """Mean loss of each row over its labeled tokens. logits: (rows, tokens, vocab); labels: (rows, tokens)."""
    import torch

    labeled = labels[:, 1:] != IGNORE_INDEX
    rows, positions = labeled.nonzero(as_tuple=True)
    losses = torch.nn.functional.cross_entropy(
        logits[rows, positions].float(), labels[:, 1:][rows, positions], reduction="none"
    )
    sums = torch.zeros(len(labels), device=labels.device).index_add_(0, rows, losses)
    return [float(value) for value in sums / labeled.sum(dim=1)]
