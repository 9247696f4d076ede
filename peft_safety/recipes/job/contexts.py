"""Calibration rows in the contexts of a job's own data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft_safety.data import read_jsonl
from peft_safety.data.contexts import with_turns
from peft_safety.data.own_contexts import KINDS, in_data_context, shared
from peft_safety.data.rows import as_rows, kind_of
from peft_safety.data.templates import roles
from peft_safety.errors import ConfigError, DataError
from peft_safety.recipes.job.data import has_turns

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from peft_safety.data.rows import Row, Rows

TAKEN = {"system": (("system",), 1), "all": (KINDS, 3)}
"""By the value of the option: which contexts count, and in how many of them each calibration row is read."""
LOOKED_AT = 10_000
"""Rows of the data, at most, that contexts are looked for in."""


def check_kind(kind: str, method: str, subspace: str) -> None:
    """Refuse a value of the option that is none, or where no subspace is calibrated."""
    if kind not in TAKEN:
        raise ConfigError(f"calibration_contexts={kind!r}. Use one of {', '.join(TAKEN)}.")
    if method == "lora":
        raise ConfigError("method 'lora' has no option 'calibration_contexts'. Leave it out, or take another method.")
    if subspace != "auto":
        raise ConfigError("calibration_contexts: the given subspace is taken as it is. Leave one of the two out.")


def check_chat(data: Dataset, option: str) -> None:
    """Refuse training rows that have no turns, which an option reads."""
    if not has_turns(data):
        raise ConfigError(
            f"{option} needs rows of chat: {{messages}}, or {{prompt, completion}} of turns. "
            f"These have {sorted(data.column_names)}. Leave it out."
        )


def checked_rows(path: str) -> list[Row]:
    """The rows of a file that somebody has checked. As rows to train on, {messages} may end in any turn.

    Raises:
        DataError: the file cannot be read, or a row has no user turn.
    """
    rows: list[Row] = [*read_jsonl(path)]
    try:
        rows = [with_turns(r, r["messages"], []) if kind_of(r) == "messages" else r for r in as_rows(rows)]
        shared([], rows)
    except DataError as error:
        raise DataError(f"clean, {path}: {error}") from error
    return rows


def contexts_for(
    rows: Rows, data: Dataset, kind: str, seed: int, tokenizer: PreTrainedTokenizerBase, clean: Rows = ()
) -> list[dict[str, object]]:
    """The calibration rows once more, in the contexts of the training rows: see `in_data_context`."""
    kinds, count = TAKEN[kind]
    return in_data_context(rows, requests(data) or [], count, seed, tokenizer=tokenizer, kinds=kinds, clean=clean)


def system_prompts(data: Dataset) -> int:
    """How many of the first rows have a system prompt that calibration can take; 0 for rows that are not chat."""
    return sum(len(rows) for kind, rows in shared(requests(data) or []) if kind == "system")


def requests(data: Dataset) -> list[dict[str, Any]] | None:
    """The turns of the first rows that ask something, as in_data_context reads them; None for rows that are not chat.
    A row may end in any turn.
    """
    if not has_turns(data):
        return None
    rows = data.select(range(min(LOOKED_AT, len(data))))
    every = [row["messages"] if "messages" in row else [*row["prompt"], *row["completion"]] for row in rows]
    return [{"prompt": turns} for turns in every if "user" in roles(turns)]
