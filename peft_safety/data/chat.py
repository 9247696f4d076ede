"""From rows to tokens: the model's own chat template, with a loss on what the assistant says only."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from peft_safety.data.labels import label_mask
from peft_safety.data.rows import SHAPES, Row, Rows, as_rows, kind_of, label_list, label_names, plain_row
from peft_safety.data.templates import Chat, Message, plain_messages, read_tools, roles
from peft_safety.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

Feature = dict[str, Any]
IGNORE_INDEX = -100
"""The label that torch's cross entropy skips."""


def classification_prompt(text: str, labels: Sequence[str]) -> str:
    """The user turn of a classification row: the list of labels first, then the text."""
    return f"Answer with one of these labels: {', '.join(labels)}.\n\nText: {text}"


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    """`messages` by the model's chat template, up to and including the header of the assistant's next turn."""
    return Chat(tokenizer).text(plain_messages(messages), header=True)


def encode(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], max_length: int) -> Feature:
    """`encode_row` for one conversation: a single answer with its prompt, or several answers as {messages}."""
    turns = plain_messages(messages)
    first = (*roles(turns), "assistant").index("assistant")
    single = first == len(turns) - 1 > 0
    row = {"prompt": turns[:first], "response": turns[first:]} if single else {"messages": turns}
    return encode_row(tokenizer, row, max_length)


def encode_row(tokenizer: PreTrainedTokenizerBase, row: Row, max_length: int, labels: Sequence[str] = ()) -> Feature:
    """Tokens and labels of a row of any accepted kind: the labels that TRL's SFTTrainer gives.

    A label is the token itself for what the assistant says, with the end-of-turn token and the white space after it,
    and -100 elsewhere. {prompt, response} rows are labeled after their prompt, as TRL's {prompt, completion} rows of
    turns; every assistant turn of a {messages} row is labeled, as by TRL's assistant-only loss. Rows of tokens stay.

    Args:
        row: may have the columns `tools` (JSON schemas), `chat_template_kwargs`, `distil` (passed on), and `truncated`
            (True leaves what follows the last turn's text unlabeled, for a response that was cut off).
        max_length: tokens kept, from the left; a label past them is lost.
        labels: every label of the data set; needed for {text, label}.

    Raises:
        DataError: no chat template, or one that refuses these turns, leaves one out, or rewrites earlier ones.
    """
    if "input_ids" in row:
        return {name: values[:max_length] for name, values in _tokens(row).items()}
    if max_length < 1:
        raise DataError(f"max_length = {max_length} keeps no token. Give at least 1.")
    prompt, answer = row_turns(row, labels)
    chat = chat_of(tokenizer, row)
    asked = None if kind_of(plain_row(row)) == "messages" else len(prompt)
    ids, mask = label_mask(chat, prompt + answer, asked, end_of_turn=not row.get("truncated", False))
    tokens = [token if labeled else IGNORE_INDEX for token, labeled in zip(ids, mask, strict=True)][:max_length]
    feature: Feature = {"input_ids": ids[:max_length], "attention_mask": [1] * len(tokens), "labels": tokens}
    return feature | {"distil": True} if row.get("distil") else feature


def _tokens(row: Row) -> Feature:
    """The three columns of a tokenized row, as lists."""
    columns: Feature = {name: row.get(name) for name in ("input_ids", "attention_mask", "labels")}
    plain = {name: getattr(value, "tolist", lambda value=value: value)() for name, value in columns.items()}
    flat = all(isinstance(v, (list, tuple)) and all(isinstance(token, int) for token in v) for v in plain.values())
    if not flat or len({len(value) for value in plain.values()}) != 1:
        given = ", ".join(f"{name} {getattr(v, 'shape', type(v).__name__)}" for name, v in columns.items())
        raise DataError(f"a tokenized row has {given}. Give all three as flat lists of whole numbers, of one length.")
    return {name: list(value) for name, value in plain.items()}


def encode_each(
    tokenizer: PreTrainedTokenizerBase, rows: Rows, max_length: int, labels: Sequence[Any] | None = None
) -> list[Feature | None]:
    """`encode_row` for every row, with errors that name it; None for a row whose answer lies past `max_length`."""
    rows = as_rows(rows)
    if not rows:
        raise DataError(f"no rows to encode. Give at least one of {SHAPES}.")
    given = [] if labels is None else list(labels)
    names = label_list(given) if given else label_names(rows)
    features = _each(rows, lambda row: encode_row(tokenizer, row, max_length, names))
    return [feature if set(feature["labels"]) - {IGNORE_INDEX} else None for feature in features]


def encode_rows(
    tokenizer: PreTrainedTokenizerBase, rows: Rows, max_length: int, labels: Sequence[Any] | None = None
) -> list[Feature]:
    """Tokens and labels of rows, for a loop of your own or a `Trainer`: the labels that TRL's SFTTrainer gives.

    Args:
        tokenizer: with a chat template.
        rows: {prompt, response} or {prompt, completion}, {messages}, {text, label}, or tokenized rows: a list or a
            data set.
        max_length: tokens kept of each row, from the left.
        labels: every label of {text, label} rows; default: those that occur.

    Returns:
        One dict a row, of three lists of so many whole numbers as the row has tokens: `input_ids`, `attention_mask`
        (ones) and `labels` (the token where the assistant speaks, else -100). Rows without a label within
        `max_length` are left out, with a warning that names them.

    Raises:
        DataError: no rows, a malformed one (its number is named), none with a label, or no chat template.
    """
    features = encode_each(tokenizer, rows, max_length, labels)
    dropped = [index for index, feature in enumerate(features) if feature is None]
    if len(dropped) == len(features):
        raise DataError(f"no row has a response token within max_length = {max_length} tokens. Raise max_length.")
    if dropped:
        named = ", ".join(map(str, dropped[:5])) + (", ..." if len(dropped) > 5 else "")
        lost = f"{len(dropped)} of {len(features)} rows have no response token within {max_length} tokens"
        warnings.warn(f"{lost} and are left out: rows {named}", stacklevel=2)
    return [feature for feature in features if feature is not None]


def encode_prompts(tokenizer: PreTrainedTokenizerBase, rows: Rows, max_length: int) -> list[Feature]:
    """Tokens of rows of a "prompt" alone, up to and including the header of the answer; no position has a label. A
    warning counts the prompts that `max_length` cuts: the request itself may be what is lost.
    """
    cut: list[bool] = []

    def encoded(row: Row) -> Feature:
        chat = chat_of(tokenizer, row)
        whole = chat.ids(chat.text(turns_of(row["prompt"], "user"), header=True))
        cut.append(len(whole) > max_length)
        ids = whole[:max_length]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [IGNORE_INDEX] * len(ids)}

    features = _each(as_rows(rows), encoded)
    if any(cut):
        lost = f"{sum(cut)} of {len(cut)} prompts are longer than max_length = {max_length} tokens, and lose their end"
        warnings.warn(f"{lost}. Raise max_length.", stacklevel=2)
    return features


def is_prompt_only(row: Row) -> bool:
    return kind_of(plain_row(row)) == "prompt"


def chat_of(tokenizer: PreTrainedTokenizerBase, row: Row) -> Chat:
    """The chat template with the row's `tools` and `chat_template_kwargs`."""
    options = row.get("chat_template_kwargs") or {}
    if not isinstance(options, Mapping):
        raise DataError(f"'chat_template_kwargs' is a {type(options).__name__}. Give a mapping of template variables.")
    options = {key: value for key, value in options.items() if value is not None}
    return Chat(tokenizer, read_tools(row.get("tools")), options)


def row_turns(row: Row, labels: Sequence[str] = ()) -> tuple[list[Message], list[Message]]:
    """The prompt's turns and the answer's turns of a row of any accepted kind; a {messages} row is all answer."""
    row = plain_row(row)
    kind = kind_of(row)
    prompt: list[Message] = []
    if kind == "messages":
        answer = plain_messages(row["messages"])
    elif kind == "pair":
        prompt, answer = turns_of(row["prompt"], "user"), turns_of(row["response"], "assistant")
    elif kind == "label":
        prompt = turns_of(classification_prompt(row["text"], labels), "user")
        answer = turns_of(row["label"], "assistant")
    else:
        raise DataError(f"a row has fields {sorted(map(str, row))}. Accepted: {SHAPES}.")
    last = answer[-1] if answer else {}
    if last.get("role") != "assistant" or not (str(last.get("content", "")).strip() or last.get("tool_calls")):
        wrong = f"the last of the turns {roles(answer)} is no non-empty assistant turn to train on"
        raise DataError(f"{wrong}. Accepted rows: {SHAPES}.")
    return prompt, answer


def turns_of(given: Any, role: str) -> list[Message]:
    return plain_messages([{"role": role, "content": given}] if isinstance(given, str) else given)


def _each(rows: Sequence[Row], encoded: Callable[[Row], Feature]) -> list[Feature]:
    """`encoded` of every row, with errors that name the row."""
    features = []
    for index, row in enumerate(rows):
        try:
            features.append(encoded(row))
        except DataError as error:
            raise DataError(f"row {index}: {error}") from error
    return features


class Collator:
    """Makes a batch of what `encode_rows` gives, as `collate_fn` of a `DataLoader` or `data_collator` of a `Trainer`:
    a dict of `input_ids`, `attention_mask` and `labels`, int64 `(batch, tokens)`. Shorter rows are padded on the
    right: ids with the pad token (else the end-of-sequence token), mask with 0, labels with -100.

    Args:
        tokenizer: names the pad token.
        distil: also say which rows have `"distil": True`, `(batch,)` bool.
        trim: give labels of the last positions only, `(batch, kept)`, and `kept` as `logits_to_keep`, which the model
            must take: the same loss, without the logits of a long prompt, a quarter of the step for SmolLM2-135M with
            one-word answers.

    Raises:
        DataError: the tokenizer has neither a pad token nor an end-of-sequence token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, distil: bool = False, trim: bool = False) -> None:
        self.distil, self.trim = distil, trim
        self.padding = {"input_ids": pad_id(tokenizer), "attention_mask": 0, "labels": IGNORE_INDEX}

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        import torch

        width = max(len(feature["input_ids"]) for feature in features)
        batch = {
            key: torch.tensor([feature[key] + [fill] * (width - len(feature[key])) for feature in features])
            for key, fill in self.padding.items()
        }
        if self.distil:
            batch["distil"] = torch.tensor([feature.get("distil", False) for feature in features])
        if not self.trim:
            return batch
        first = int((batch["labels"] != IGNORE_INDEX).any(dim=0).int().argmax())
        start = max(first - 1, 0)  # the logits before a token predict it
        return batch | {"labels": batch["labels"][:, start:], "logits_to_keep": width - start}


def row_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy `(rows,)`, fp32, over each row's labels `(rows, tokens)`; logits `(rows, tokens, vocabulary)`."""
    import torch

    rows, positions = (labels[:, 1:] != IGNORE_INDEX).nonzero(as_tuple=True)
    predicted, target = logits[rows, positions].float(), labels[:, 1:][rows, positions]
    losses = torch.nn.functional.cross_entropy(predicted, target, reduction="none")
    return torch.zeros(len(labels), device=logits.device).index_add(0, rows, losses)


def can_trim(model: Any) -> bool:
    """Whether a causal language model can be asked for the logits of the last positions only."""
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(bare.forward).parameters


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The pad token, or the end-of-sequence token of a tokenizer without one (padding is masked)."""
    token = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if token is None:
        raise DataError("the tokenizer has neither a pad nor an end-of-sequence token. Set tokenizer.pad_token.")
    return int(token)
