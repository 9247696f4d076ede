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

from peft_safety.data import preference_pairs, refusal_pairs
from peft_safety.data.chat import IGNORE_INDEX, Collator, encode_row, encode_rows, has_labels
from peft_safety.data.rows import Rows, as_rows
from peft_safety.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Features = list[dict[str, Any]]


def package_rows(objective: str, seed: int = 0) -> list[dict[str, str]]:
    """The package's own training split: harmful requests with refusals, and for DPO contentless openings as what is
    not wanted.
    """
    return preference_pairs("train", seed=seed) if objective == "dpo" else refusal_pairs("train", seed=seed)


def features_of(rows: Rows, tokenizer: PreTrainedTokenizerBase, objective: str, max_length: int) -> Features:
    """Tokens and labels: one sequence a row for SFT, `chosen` and `rejected` for DPO.

    Raises:
        DataError: malformed rows, or none with a response inside `max_length`.
    """
    if objective == "sft":
        return encode_rows(tokenizer, rows, max_length)
    rows = as_rows(rows)
    if not rows:
        raise DataError('no preference pairs. Give at least one row {"prompt", "chosen", "rejected"}.')
    found: Features = []
    for index, row in enumerate(rows):
        if not all(_said(row.get(key)) for key in ("prompt", "chosen", "rejected")):
            raise DataError(
                f'row {index}: DPO needs {{"prompt", "chosen", "rejected"}}, each non-empty text or messages. '
                f"The row has {sorted(row)}."
            )
        sides = {
            side: encode_row(
                tokenizer,
                {"prompt": row["prompt"], "response": row[side], "truncated": row.get("truncated")},
                max_length,
            )
            for side in ("chosen", "rejected")
        }
        if all(map(has_labels, sides.values())):
            found.append(sides)
    if not found:
        raise DataError(
            f"no preference pair has both responses within max_length = {max_length} tokens. Raise max_length."
        )
    if len(found) < len(rows):
        warnings.warn(
            f"{len(rows) - len(found)} of {len(rows)} pairs have no response token within {max_length} tokens and are "
            "left out",
            stacklevel=2,
        )
    return found


def _said(content: Any) -> bool:
    return bool(content.strip() if isinstance(content, str) else isinstance(content, list) and content)


class Batches:
    """Collates features: for DPO all chosen sequences, then all rejected ones, with the reference's log-probabilities
    where they are there.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, objective: str) -> None:
        self.collate, self.objective = Collator(tokenizer), objective

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        if self.objective == "sft":
            return self.collate(features)
        sequences = [feature[side] for side in ("chosen", "rejected") for feature in features]
        batch = self.collate(sequences)
        if "reference" in features[0]:
            batch["reference"] = torch.tensor([feature["reference"] for feature in features])
        return batch


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
        policy: `(2 pairs,)`, the chosen ones first.
        reference: `(pairs, 2)`, chosen and rejected.

    Reference: Rafailov et al., arXiv 2305.18290, equation 7.
    """
    chosen, rejected = policy.chunk(2)
    margin = (chosen - rejected) - (reference[:, 0] - reference[:, 1]).to(policy)
    return -F.logsigmoid(beta * margin).mean()


def sft_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of the response tokens, averaged over all of them."""
    return -response_log_probs(logits, labels).sum() / (labels[:, 1:] != IGNORE_INDEX).sum()
