"""How well a model does the task it was fine-tuned on, and how far it drifted elsewhere."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from peft_safety.data.chat import IGNORE_INDEX, Collator, Row, can_trim, classification_prompt, encode_rows
from peft_safety.errors import DataError
from peft_safety.evaluation.generate import BATCH_SIZE, generate, inference
from peft_safety.evaluation.metrics import Mean, Rate

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def is_classification(rows: Sequence[Row]) -> bool:
    """Whether `rows` are {text, label} rows.

    Raises:
        DataError: some are and some are not, so that no single figure describes them.
    """
    labelled = sum("label" in row for row in rows)
    if 0 < labelled < len(rows):
        raise DataError(f"{labelled} of {len(rows)} rows have a label and the others do not. Split them into two data sets.")
    return labelled > 0


def accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    labels: Sequence[str],
    *,
    batch_size: int = BATCH_SIZE,
    progress: bool = True,
) -> Rate:
    """Share of {text, label} rows whose greedy answer is the label, case and surrounding punctuation aside.

    Exact match of what the model says, rather than the likelihood of each label: it costs one short generation a row however many labels there
    are, and counts an answer that a user could not use (a refusal, a sentence) as wrong.

    Args:
        labels: every label of the task, as in training; they are listed in the prompt.
    """
    return Rate.of(exact_answers(model, tokenizer, rows, labels, batch_size=batch_size, progress=progress))


def exact_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    labels: Sequence[str],
    *,
    batch_size: int = BATCH_SIZE,
    progress: bool = True,
) -> list[bool]:
    """`accuracy`, row by row: what a paired comparison of two models needs."""
    budget = max(len(tokenizer(label, add_special_tokens=False)["input_ids"]) for label in labels) + 2
    prompts = [classification_prompt(row["text"], labels) for row in rows]
    answers = generate(model, tokenizer, prompts, max_new_tokens=budget, batch_size=batch_size, description="task", progress=progress)
    return [normalise(answer.text) == normalise(row["label"]) for answer, row in zip(answers, rows, strict=True)]


def choice_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    labels: Sequence[str],
    *,
    batch_size: int = BATCH_SIZE,
    progress: bool = True,
) -> Rate:
    """Share of {text, label} rows whose label is the likeliest, in nats a token: what a model knows of a task whose form it was never taught.

    Args:
        labels: every label of the task; each is tried for each row.
    """
    return Rate.of(likeliest_labels(model, tokenizer, rows, labels, batch_size=batch_size, progress=progress))


def likeliest_labels(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    labels: Sequence[str],
    *,
    batch_size: int = BATCH_SIZE,
    progress: bool = True,
) -> list[bool]:
    """`choice_accuracy`, row by row."""
    asked = [{"prompt": classification_prompt(row["text"], labels), "response": label, "truncated": True} for row in rows for label in labels]
    losses = response_losses(model, tokenizer, asked, batch_size=batch_size, description="task", progress=progress)
    by_row = [losses[start : start + len(labels)] for start in range(0, len(losses), len(labels))]
    return [labels[found.index(min(found))] == row["label"] for found, row in zip(by_row, rows, strict=True)]


def normalise(answer: str) -> str:
    """Lower case, without white space, quotes and punctuation at the ends."""
    return re.sub(r"^\W+|\W+$", "", answer.lower())


def response_nll(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    max_length: int = 512,
    batch_size: int = BATCH_SIZE,
    description: str = "nll",
    progress: bool = True,
) -> Mean:
    """Negative log-likelihood of the responses, in nats a token, averaged within each row and then over the rows.

    Args:
        rows: {prompt, response} or {messages} rows.
        max_length: tokens kept of each row, from the left.
    """
    return Mean.of(response_losses(model, tokenizer, rows, max_length=max_length, batch_size=batch_size, description=description, progress=progress))


def response_losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    max_length: int = 512,
    batch_size: int = BATCH_SIZE,
    description: str = "nll",
    progress: bool = True,
) -> list[float]:
    """`response_nll` of each row, in the order of `rows`."""
    import torch
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    features = encode_rows(tokenizer, rows, max_length)
    order = sorted(range(len(features)), key=lambda index: len(features[index]["input_ids"]))
    collate, means = Collator(tokenizer, trim=can_trim(model)), [0.0] * len(features)
    with tqdm(total=len(features), desc=description, unit="row", disable=not progress, leave=False) as bar, inference(model), torch.inference_mode():
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = {key: value.to(model.device) if isinstance(value, torch.Tensor) else value for key, value in collate([features[i] for i in chosen]).items()}
            labels = batch.pop("labels")
            for index, mean in zip(chosen, _row_means(model(**batch).logits, labels), strict=True):
                means[index] = mean
            bar.update(len(chosen))
    return means


def _row_means(logits: torch.Tensor, labels: torch.Tensor) -> list[float]:
    """Mean loss of each row over its labelled tokens. logits: (rows, tokens, vocab); labels: (rows, tokens)."""
    import torch

    kept = labels[:, 1:] != IGNORE_INDEX
    rows, positions = kept.nonzero(as_tuple=True)
    losses = torch.nn.functional.cross_entropy(logits[rows, positions].float(), labels[:, 1:][rows, positions], reduction="none")
    sums = torch.zeros(len(labels), device=labels.device).index_add_(0, rows, losses)
    return [float(value) for value in sums / kept.sum(dim=1)]
