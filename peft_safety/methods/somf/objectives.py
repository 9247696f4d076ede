"""What a mask is trained for: preferring safe answers (DPO), or giving them (SFT). From rows to features, and from
logits to losses.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_safety.data.chat import IGNORE_INDEX, Collator, encode_each, encode_rows
from peft_safety.data.rows import Rows, as_rows
from peft_safety.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Features = list[dict[str, Any]]
SIDES = ("chosen", "rejected")


def features_of(rows: Rows, tokenizer: PreTrainedTokenizerBase, objective: str, max_length: int) -> Features:
    """Tokens and labels: one sequence per row for SFT, `chosen` and `rejected` for DPO.

    Raises:
        DataError: malformed rows, or none with a response inside `max_length`.
    """
    if objective == "sft":
        return encode_rows(tokenizer, rows, max_length)
    rows = as_rows(rows)
    for index, row in enumerate(rows):
        if not row.keys() >= {"prompt", *SIDES}:
            raise DataError(f"row {index} has {sorted(row)}. DPO needs rows {{prompt, chosen, rejected}}.")
    encoded = [encode_each(tokenizer, [_answered(row, side) for row in rows], max_length) for side in SIDES]
    pairs: Features = [dict(zip(SIDES, pair, strict=True)) for pair in zip(*encoded, strict=True) if all(pair)]
    if not pairs:
        raise DataError(f"no pair has both responses within max_length = {max_length} tokens. Raise max_length.")
    if len(pairs) < len(rows):
        lost = f"{len(rows) - len(pairs)} of {len(rows)} pairs"
        warnings.warn(f"{lost} have no response token within {max_length} tokens and are left out", stacklevel=2)
    return pairs


def _answered(row: Mapping[str, Any], side: str) -> dict[str, Any]:
    return {"prompt": row["prompt"], "response": row[side], "truncated": row.get("truncated")}


class Batches:
    """Collates features: for DPO all chosen sequences, then all rejected ones."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, objective: str) -> None:
        self.collate, self.objective = Collator(tokenizer), objective

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        if self.objective == "dpo":
            features = [feature[side] for side in SIDES for feature in features]
        return self.collate(features)


def response_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of each row's response, summed over its tokens: `(rows,)`, fp32.

    Args:
        logits: `(rows, tokens, vocabulary)`. labels: `(rows, tokens)`, -100 where there is no response.
    """
    rows, positions = (labels[:, 1:] != IGNORE_INDEX).nonzero(as_tuple=True)
    losses = F.cross_entropy(logits[rows, positions].float(), labels[:, 1:][rows, positions], reduction="none")
    return -torch.zeros(len(labels), device=logits.device).index_add(0, rows, losses)


def dpo_loss(policy: Tensor, reference: Tensor, beta: float) -> Tensor:
    """`-log sigmoid(beta [(log p(chosen) - log p(rejected)) - the same of the reference])`, averaged.

    Args:
        policy, reference: `(2 pairs,)`, the chosen ones first.

    Reference: Rafailov et al., arXiv 2305.18290, equation 7.
    """
    chosen, rejected = (policy - reference).chunk(2)
    return -F.logsigmoid(beta * (chosen - rejected)).mean()


def sft_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of the response tokens, averaged over all of them."""
    return -response_log_probs(logits, labels).sum() / (labels[:, 1:] != IGNORE_INDEX).sum()
