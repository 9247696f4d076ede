"""Calibration rows in the contexts of a job's own data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft_safety.data.own_contexts import KINDS, in_data_context, shared
from peft_safety.errors import ConfigError, DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from peft_safety.data.rows import Rows

TAKEN = {"system": (("system",), 1), "all": (KINDS, 3)}
"""By the value of the option: which contexts count, and in how many of them each calibration row is read."""
LOOKED_AT = 10_000
"""Rows of the data, at most, that contexts are looked for in."""


def check_kind(kind: str, subspace: str) -> None:
    """Refuse a value of the option that is none, or beside a subspace that is not calibrated here."""
    if kind not in TAKEN:
        raise ConfigError(f"calibration_contexts={kind!r}. Use one of {', '.join(TAKEN)}.")
    if subspace != "auto":
        raise ConfigError("calibration_contexts: the given subspace is taken as it is. Leave one of the two out.")


def contexts_for(
    rows: Rows, data: Dataset, kind: str, seed: int, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, object]]:
    """The calibration rows once more, in the contexts of the training rows: see `in_data_context`.

    Raises:
        ConfigError: training rows that are not chat.
    """
    kinds, count = TAKEN[kind]
    asked = requests(data)
    if asked is None:
        raise ConfigError(
            f"calibration_contexts={kind!r} needs rows of chat: {{messages}}, or {{prompt, completion}} of turns. "
            f"These have {sorted(data.column_names)}. Leave it out."
        )
    return in_data_context(rows, asked, count, seed, tokenizer=tokenizer, kinds=kinds)


def system_prompts(data: Dataset) -> int:
    """How many system prompts several of the first rows share; 0 for rows that cannot be read as chat."""
    try:
        return sum(kind == "system" for kind, _ in shared(requests(data) or []))
    except DataError:
        return 0


def requests(data: Dataset) -> list[dict[str, Any]] | None:
    """The first rows of the data as in_data_context reads them; None for rows that are not chat."""
    first = data[0]
    rows = data.select(range(min(LOOKED_AT, len(data))))
    if "messages" in first:
        return [{"messages": row["messages"]} for row in rows]
    if isinstance(first.get("prompt"), list) and "completion" in first:
        return [{"prompt": row["prompt"], "response": row["completion"]} for row in rows]
    return None
