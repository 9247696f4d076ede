"""From rows to tokens: the model's own chat template, with a loss on the assistant's tokens only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from peft_safety.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]
Row = Mapping[str, Any]
IGNORE_INDEX = -100
"""The label that torch's cross entropy skips."""
SHAPES = '{"prompt", "response"}, {"text", "label"} or {"messages": [{"role", "content"}, ...]}'


def label_names(rows: Iterable[Row]) -> list[str]:
    """The sorted distinct labels of the {text, label} rows; empty for other kinds of rows."""
    return sorted({str(row["label"]) for row in rows if "label" in row})


def classification_prompt(text: str, labels: Sequence[str]) -> str:
    """The user turn of a classification row: the labels to choose from, then the text: instruction first, so that later tokens know their task."""
    return f"Answer with one of these labels: {', '.join(labels)}.\n\nText: {text}"


def to_messages(row: Row, labels: Sequence[str] = ()) -> list[Message]:
    """A row of any accepted kind as chat messages that end with the assistant's turn.

    Args:
        row: {prompt, response}, {text, label} or {messages}.
        labels: every label of the data set; needed for {text, label}.

    Raises:
        DataError: a row of no accepted kind, or one whose last turn is not a non-empty assistant turn.
    """
    if "messages" in row:
        messages = [dict(message) for message in row["messages"]]
    elif "prompt" in row and "response" in row:
        messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]
    elif "text" in row and "label" in row:
        messages = [{"role": "user", "content": classification_prompt(row["text"], labels)}, {"role": "assistant", "content": row["label"]}]
    else:
        raise DataError(f"a row has fields {sorted(row)}. Accepted: {SHAPES}.")
    for message in messages:
        if not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise DataError(f"a message has {message!r}. Each message needs a string 'role' and a string 'content'.")
    if not messages or messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():
        raise DataError(f"the last turn of a row must be a non-empty assistant turn to train on. The row has fields {sorted(row)}; accepted: {SHAPES}.")
    return messages


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    """`messages` by the model's chat template, up to and including the header of the assistant's next turn."""
    return _render(tokenizer, messages, add_generation_prompt=True)


def encode(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], max_length: int, end_of_turn: bool = True) -> dict[str, list[int]]:
    """Tokens and labels of one conversation.

    A label is the token itself for what the assistant says, end-of-turn token included, and -100 elsewhere; white space that a template puts
    after the end of a turn belongs to no turn.

    Args:
        messages: ends with an assistant turn; every assistant turn is labelled.
        max_length: tokens kept, from the left.
        end_of_turn: False leaves the end-of-turn token of the last turn unlabelled, for a response that was cut off.

    Returns:
        `input_ids`, `attention_mask` and `labels`, lists of equal length.

    Raises:
        DataError: no chat template, or one that rewrites earlier turns (then train on the last turn's own prompt instead).
    """
    text = _render(tokenizer, messages, add_generation_prompt=False)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        header = render_prompt(tokenizer, messages[:index])
        turn = _render(tokenizer, messages[: index + 1], add_generation_prompt=False).rstrip()
        if not turn.startswith(header) or not text.startswith(turn):
            raise DataError(f"the chat template rewrites turn {index} once later turns follow. Give each assistant turn as its own prompt/response row.")
        spans.append((len(header), len(turn)))
    if not end_of_turn:
        begin, content = spans[-1][0], messages[-1]["content"].strip()
        spans[-1] = (begin, text.index(content, begin) + len(content))
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, truncation=True, max_length=max_length)
    ids = list(tokens["input_ids"])
    labels = [
        token if any(start <= left and right <= end for start, end in spans) else IGNORE_INDEX
        for token, (left, right) in zip(ids, tokens["offset_mapping"], strict=True)
    ]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def encode_rows(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], max_length: int, labels: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """`encode` every row; a row with `"truncated": True` gets no end-of-turn label, and `"distil": True` is passed on.

    Args:
        labels: the labels of a classification task; None takes those of `rows`.

    Returns:
        One feature dict a row. Rows whose response lies past `max_length` are left out, with a warning that counts them.

    Raises:
        DataError: no rows, a malformed row (its index is named), or no row with a response token inside `max_length`.
    """
    import warnings

    if not rows:
        raise DataError(f"no rows to encode. Give at least one of {SHAPES}.")
    labels = label_names(rows) if labels is None else labels
    features = []
    for index, row in enumerate(rows):
        try:
            feature: dict[str, Any] = encode(tokenizer, to_messages(row, labels), max_length, end_of_turn=not row.get("truncated", False))
            features.append(feature | {"distil": True} if row.get("distil") else feature)
        except DataError as error:
            raise DataError(f"row {index}: {error}") from error
    kept = [feature for feature in features if any(label != IGNORE_INDEX for label in feature["labels"])]
    if not kept:
        raise DataError(f"no row has a response token within max_length = {max_length} tokens. Raise max_length.")
    if len(kept) < len(rows):
        warnings.warn(f"{len(rows) - len(kept)} of {len(rows)} rows have no response token within {max_length} tokens and are left out", stacklevel=2)
    return kept


def encode_prompts(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], max_length: int) -> list[dict[str, list[int]]]:
    """Rows of a "prompt" alone, up to and including the header of the answer, as `encode` would give them: no position has a label."""
    features = []
    for row in rows:
        text = render_prompt(tokenizer, [{"role": "user", "content": str(row["prompt"])}])
        ids = tokenizer(text, add_special_tokens=False, truncation=True, max_length=max_length)["input_ids"]
        features.append({"input_ids": list(ids), "attention_mask": [1] * len(ids), "labels": [IGNORE_INDEX] * len(ids)})
    return features


class Collator:
    """Pads features on the right to the longest of the batch: ids with the pad token, mask with 0, labels with -100.

    Args:
        distil: also say which rows have `"distil": True`, `(batch,)` bool.
        trim: also say how many of the last positions need logits (`logits_to_keep`), and give labels of those only. The loss is the same, and the vocabulary's
            logits of a long prompt are never made: a quarter of the step for SmolLM2-135M on a task whose answers are a word.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, distil: bool = False, trim: bool = False) -> None:
        self.distil, self.trim = distil, trim
        self.padding = {"input_ids": pad_id(tokenizer), "attention_mask": 0, "labels": IGNORE_INDEX}

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        import torch

        width = max(len(feature["input_ids"]) for feature in features)
        batch = {key: torch.tensor([feature[key] + [fill] * (width - len(feature[key])) for feature in features]) for key, fill in self.padding.items()}
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
    """The pad token, or the end-of-sequence token of a tokenizer without one (padding is masked, so either will do)."""
    found = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if found is None:
        raise DataError("the tokenizer has neither a pad nor an end-of-sequence token. Set tokenizer.pad_token.")
    return int(found)


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], add_generation_prompt: bool) -> str:
    if not tokenizer.chat_template:
        raise DataError("the tokenizer has no chat template. Use an instruct model, or set tokenizer.chat_template.")
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=add_generation_prompt))
    except TemplateError as error:
        roles = [message["role"] for message in messages]
        raise DataError(f"the chat template refuses turns {roles}: {error}. Start with a user turn and alternate user and assistant.") from error
