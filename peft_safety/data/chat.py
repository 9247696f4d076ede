"""From rows to tokens: the model's own chat template, with a loss on what the assistant says only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from peft_safety.data.labels import label_mask
from peft_safety.data.rows import SHAPES, Row, Rows, as_rows, kind_of, label_list, label_names, plain_row
from peft_safety.data.templates import Chat, Message, plain_messages, read_tools
from peft_safety.errors import DataError

if TYPE_CHECKING:
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


def encode(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], max_length: int, end_of_turn: bool = True
) -> Feature:
    """Tokens and labels of one conversation that ends with an assistant turn; see `encode_row`.

    Args:
        end_of_turn: False leaves what follows the last turn's text unlabeled, for a response that was cut off.
    """
    turns = _answered(plain_messages(messages))
    answers = [index for index, message in enumerate(turns) if message["role"] == "assistant"]
    single = len(answers) == 1 and answers[0] > 0
    return _encode(Chat(tokenizer), turns, answers[0] if single else None, max_length, end_of_turn)


def encode_row(tokenizer: PreTrainedTokenizerBase, row: Row, max_length: int, labels: Sequence[str] = ()) -> Feature:
    """Tokens and labels of a row of any accepted kind: the labels that TRL's SFTTrainer gives.

    A label is the token itself for what the assistant says, with the end-of-turn token and the white space after it,
    and -100 elsewhere. {prompt, response} rows are labeled after their prompt, as TRL's {prompt, completion} rows of
    turns; every assistant turn of a {messages} row is labeled, as by TRL's assistant-only loss.

    Args:
        row: may have the columns `tools` (JSON schemas), `chat_template_kwargs`, `distil`, and `truncated` (True
            leaves what follows the last turn's text unlabeled, for a response that was cut off).
        max_length: tokens kept, from the left; a label past them is lost.

    Returns:
        `input_ids`, `attention_mask` and `labels`, lists of equal length.

    Raises:
        DataError: no chat template, or one that refuses these turns, leaves one out, or rewrites earlier ones (then
            train on the last turn's own prompt).
    """
    options = row.get("chat_template_kwargs") or {}
    if not isinstance(options, Mapping):
        raise DataError(f"'chat_template_kwargs' is a {type(options).__name__}. Give a mapping of template variables.")
    prompt, answer = row_turns(row, labels)
    chat = Chat(
        tokenizer, read_tools(row.get("tools")), {key: value for key, value in options.items() if value is not None}
    )
    turns = None if row.get("messages") is not None else len(prompt)
    feature: Feature = _encode(chat, prompt + answer, turns, max_length, end_of_turn=not row.get("truncated", False))
    return feature | {"distil": True} if row.get("distil") else feature


def encode_each(
    tokenizer: PreTrainedTokenizerBase, rows: Rows, max_length: int, labels: Sequence[Any] | None = None
) -> list[Feature | None]:
    """`encode_row` for every row, in their order: None for a row whose answer lies past `max_length`, where no label
    is left.

    Raises:
        DataError: no rows, or a malformed row (its index is named).
    """
    rows = as_rows(rows)
    if not rows:
        raise DataError(f"no rows to encode. Give at least one of {SHAPES}.")
    given = [] if labels is None else list(labels)
    names = label_list(given) if given else label_names(rows)
    features: list[Feature | None] = []
    for index, row in enumerate(rows):
        try:
            feature = encode_row(tokenizer, row, max_length, names)
        except DataError as error:
            raise DataError(f"row {index}: {error}") from error
        features.append(feature if has_labels(feature) else None)
    return features


def encode_rows(
    tokenizer: PreTrainedTokenizerBase, rows: Rows, max_length: int, labels: Sequence[Any] | None = None
) -> list[Feature]:
    """`encode_row` for every row; a row with `"truncated": True` gets no end-of-turn label, and `"distil": True` is
    passed on.

    Args:
        labels: the labels of a classification task; None takes those of `rows`.

    Returns:
        One feature dict a row that is kept. Rows whose answer lies past `max_length` are left out, as TRL does, with
        one warning that counts and names them. `encode_each` keeps their places.

    Raises:
        DataError: no rows, a malformed row (its index is named), or no row with a response token inside `max_length`.
    """
    import warnings

    features = encode_each(tokenizer, rows, max_length, labels)
    kept = [feature for feature in features if feature is not None]
    if not kept:
        raise DataError(f"no row has a response token within max_length = {max_length} tokens. Raise max_length.")
    dropped = [index for index, feature in enumerate(features) if feature is None]
    if dropped:
        named = ", ".join(map(str, dropped[:5])) + (", ..." if len(dropped) > 5 else "")
        warnings.warn(
            f"{len(dropped)} of {len(features)} rows have no response token within {max_length} tokens and are left "
            f"out: rows {named}",
            stacklevel=2,
        )
    return kept


def encode_prompts(tokenizer: PreTrainedTokenizerBase, rows: Rows, max_length: int) -> list[dict[str, list[int]]]:
    """Tokens of rows of a "prompt" alone, up to and including the header of the answer; no position has a label.

    Raises:
        DataError: a prompt that is neither a string nor a list of turns, or that the template refuses (the row is
            named).
    """
    features = []
    for index, row in enumerate(as_rows(rows)):
        try:
            chat = Chat(tokenizer, read_tools(row.get("tools")))
            ids = chat.ids(chat.text(_turns(row["prompt"], "user"), header=True))[:max_length]
        except DataError as error:
            raise DataError(f"row {index}: {error}") from error
        features.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [IGNORE_INDEX] * len(ids)})
    return features


def is_prompt_only(row: Row) -> bool:
    """Whether a row has a prompt and no answer."""
    return kind_of(plain_row(row)) == "prompt"


def has_labels(feature: Mapping[str, Any]) -> bool:
    """Whether any token of a feature has a label."""
    return any(label != IGNORE_INDEX for label in feature["labels"])


def _encode(
    chat: Chat, messages: list[Message], prompt_turns: int | None, max_length: int, end_of_turn: bool
) -> dict[str, list[int]]:
    if max_length < 1:
        raise DataError(f"max_length = {max_length} keeps no token. Give at least 1.")
    ids, mask = label_mask(chat, messages, prompt_turns, end_of_turn)
    labels = [token if labeled else IGNORE_INDEX for token, labeled in zip(ids, mask, strict=True)][:max_length]
    return {"input_ids": ids[:max_length], "attention_mask": [1] * len(labels), "labels": labels}


def row_turns(row: Row, labels: Sequence[str] = ()) -> tuple[list[Message], list[Message]]:
    """The prompt's turns and the answer's turns of a row of any accepted kind; a {messages} row is all answer.

    Args:
        labels: every label of the data set; needed for {text, label}.

    Raises:
        DataError: a row of no accepted kind, or one whose last turn is not an assistant turn that says or calls
            something.
    """
    row = plain_row(row)
    kind = kind_of(row)
    if kind == "messages":
        prompt, answered = [], plain_messages(row["messages"])
    elif kind == "pair":
        prompt, answered = _turns(row["prompt"], "user"), _turns(row["response"], "assistant")
    elif kind == "label":
        prompt, answered = (
            _turns(classification_prompt(row["text"], labels), "user"),
            _turns(row["label"], "assistant"),
        )
    else:
        raise DataError(f"a row has fields {sorted(map(str, row))}. Accepted: {SHAPES}.")
    return prompt, _answered(answered)


def _turns(given: Any, role: str) -> list[Message]:
    return plain_messages([{"role": role, "content": given}] if isinstance(given, str) else given)


def _answered(messages: list[Message]) -> list[Message]:
    last = messages[-1] if messages else {}
    if last.get("role") != "assistant" or not (str(last.get("content", "")).strip() or last.get("tool_calls")):
        raise DataError(
            "the last turn of a row must be a non-empty assistant turn to train on, and the turns are "
            f"{[turn['role'] for turn in messages]}. "
            f"Accepted rows: {SHAPES}."
        )
    return messages


class Collator:
    """Pads features on the right to the longest of the batch: ids with the pad token, mask with 0, labels with -100.

    Args:
        distil: also say which rows have `"distil": True`, `(batch,)` bool.
        trim: also say how many of the last positions need logits (`logits_to_keep`), and give labels of those only.
            The loss is the same, and the vocabulary's logits of a long prompt are never made: a quarter of the step
            for SmolLM2-135M on a task whose answers are a word.
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


def can_trim(model: Any) -> bool:
    """Whether a causal language model can be asked for the logits of the last positions only."""
    import inspect

    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(bare.forward).parameters


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The pad token, or the end-of-sequence token of a tokenizer without one (padding is masked)."""
    token = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if token is None:
        raise DataError("the tokenizer has neither a pad nor an end-of-sequence token. Set tokenizer.pad_token.")
    return int(token)
