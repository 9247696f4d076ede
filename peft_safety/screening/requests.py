"""From rows to requests: for each user turn the tokens up to where the assistant answers, and what the row answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peft_safety.data.chat import chat_of, row_turns, turns_of
from peft_safety.data.rows import SHAPES, Row, kind_of, plain_row
from peft_safety.data.templates import Message, plain_messages, roles
from peft_safety.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Request:
    """One user turn of a row.

    Attributes:
        row, turn: number of the row, and of the turn among its messages.
        ids: tokens of all turns so far and of the header of the answer, the last `max_length` of them.
        cut: whether tokens are missing on the left.
        text, answer: what the user says, and the row's first answer before another user turn; None without one.
    """

    row: int
    turn: int
    ids: list[int]
    cut: bool
    text: str
    answer: str | None


def requests_of(
    tokenizer: PreTrainedTokenizerBase, row: Row, number: int, max_length: int, labels: Sequence[str] = ()
) -> list[Request]:
    """The requests of row `number`, of any kind that training accepts or a `prompt` alone: each user turn that no
    other user turn follows. A DataError names the row.
    """
    try:
        if not isinstance(row, Mapping):
            raise DataError(f"a {type(row).__name__} instead of a mapping. Give rows {SHAPES}.")
        row = plain_row(row)
        turns = _turns(row, labels)
        chat = chat_of(tokenizer, row)
        order = roles(turns)
        result = []
        for turn, (role, following) in enumerate(zip(order, [*order[1:], None], strict=False)):
            if role == "user" != following:
                ids = chat.ids(chat.text(turns[: turn + 1], header=True))
                answer = _answer(turns[turn + 1 :])
                cut, text = len(ids) > max_length, str(turns[turn]["content"])
                result.append(Request(number, turn, ids[-max_length:], cut, text, answer))
        return result
    except DataError as error:
        raise DataError(f"row {number}: {error}") from error


def _answer(turns: Sequence[Message]) -> str | None:
    """What the assistant says first in turns after a request; others (system, tool) may stand before it."""
    said = next((turn for turn in turns if turn["role"] in ("assistant", "user")), {"role": "user"})
    return str(said.get("content", "")) if said["role"] == "assistant" else None


def _turns(row: Row, labels: Sequence[str]) -> list[Message]:
    if kind_of(row) == "prompt":
        return turns_of(row["prompt"], "user")
    if kind_of(row) == "messages":
        return plain_messages(row["messages"])
    if kind_of(row) == "label" and not labels:
        raise DataError("a {text, label} row of a stream, whose labels are not known beforehand. Give labels=.")
    prompt, answer = row_turns(row, labels)
    return prompt + answer
