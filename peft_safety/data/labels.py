"""Which tokens of a conversation the model is trained to say: those that TRL's SFTTrainer labels. A prompt with its
answer from the first token that differs from the prompt's own tokens; a conversation by the template's own marks, or
without them by what each answer's turn adds to the turns before it.
"""

from __future__ import annotations

from collections.abc import Sequence

from peft_safety.data.templates import Chat, Message, roles
from peft_safety.errors import DataError

SPLIT = "Give each assistant turn as its own prompt/response row"


def label_mask(
    chat: Chat, messages: Sequence[Message], prompt_turns: int | None, end_of_turn: bool
) -> tuple[list[int], list[bool]]:
    """Tokens of `messages`, and which of them have a label. A template that leaves a turn out, or rewrites what was
    asked once the answer is there, is refused.

    Args:
        prompt_turns: turns at the head that are asked; all after them is answered. None labels each assistant turn.
        end_of_turn: False leaves what follows the last turn's content unlabeled.
    """
    if prompt_turns is None and (marked := chat.training()) is not None:
        chat = marked
        ids, marks = chat.marked(messages)
        mask = [bool(mark) for mark in marks]
        if not any(mask):
            raise DataError("the chat template marks no token of the assistant. Correct its {% generation %} blocks.")
    else:
        text = chat.text(messages)
        ids = chat.ids(text)
        mask = [False] * len(ids)
        answers = [index for index, role in enumerate(roles(messages)) if role == "assistant"]
        for turn in answers if prompt_turns is None else [prompt_turns]:
            start = _start(chat, messages, turn, text, ids)
            end = _end(chat, messages, turn, text, ids) if prompt_turns is None else len(ids)
            mask[start:end] = [True] * (end - start)
    _nothing_left_out(chat, messages)
    if not end_of_turn:
        end = _shared(chat.ids(chat.text(messages, cut=True)), ids)
        mask[end:] = [False] * (len(ids) - end)
    return ids, mask


def _start(chat: Chat, messages: Sequence[Message], turn: int, text: str, ids: list[int]) -> int:
    """Index of the first token of the answer that starts with a turn."""
    asked = chat.text(messages[:turn], header=True) if turn else _opening(chat, messages, text)
    tokens = chat.ids(asked)
    start = _shared(tokens, ids)
    # The end of the header may differ, as where a template opens a thought in it. What was said before it may not.
    if not text.startswith(asked) and start < _shared(tokens, chat.ids(chat.text(messages[:turn]))):
        asked_roles = roles(messages[:turn])
        raise DataError(f"the chat template rewrites turns {asked_roles} once turn {turn} follows. {SPLIT}.")
    return start


def _end(chat: Chat, messages: Sequence[Message], turn: int, text: str, ids: list[int]) -> int:
    """Index after the last token of a turn, its end-of-turn token included."""
    if turn == len(messages) - 1:
        return len(ids)
    shown = chat.text(messages[: turn + 1])
    end = str(chat.tokenizer.eos_token or "")
    if not text.startswith(shown) and end and shown.endswith(end):
        # a template may end the conversation in addition to its last turn; but what follows the content ends the turn
        without = shown[: -len(end)]
        if not without.rstrip().endswith(str(messages[turn].get("content", "")).strip()):
            shown = without
    if not text.startswith(shown):
        remedy = f"{SPLIT}, or use a template with {{% generation %}} blocks (TRL has them for common models)."
        raise DataError(f"the chat template rewrites turn {turn} once later turns follow. {remedy}")
    return _shared(chat.ids(shown), ids)


def _opening(chat: Chat, messages: Sequence[Message], text: str) -> str:
    """The text before an assistant turn that opens a conversation: templates refuse a prompt without turns."""
    first = list(messages[:1])
    with_header, without = chat.text(first, header=True), chat.text(first)
    header = with_header[_shared(with_header, without) :]
    before = len(without)
    if first[0].get("content"):
        before = _shared(text, chat.text([_changed(first[0]), *messages[1:]]))
    at = text.rfind(header, 0, before)
    if not header.strip() or at < 0:
        raise DataError("the chat template shows no header before the assistant's first turn. Start with a user turn.")
    return text[: at + len(header)]


def _nothing_left_out(chat: Chat, messages: Sequence[Message]) -> None:
    """Refuse templates that silently drop content: a system prompt, a tool call, or parts of a text."""
    text, contents = chat.text(messages), [message.get("content", "") for message in messages]
    for index, message in enumerate(messages):
        content = contents[index].strip()
        if content and text.count(content) < sum(other.count(content) for other in contents):
            _must_show(chat, messages, index, message | {"content": f"{message['content']}x"}, text)
        if message.get("tool_calls"):
            silent = {"content": "", **{key: value for key, value in message.items() if key != "tool_calls"}}
            _must_show(chat, messages, index, silent, text)


def _must_show(chat: Chat, messages: Sequence[Message], index: int, changed: Message, text: str) -> None:
    """Refuse a template that writes the same text for turn `index` and for a changed turn."""
    try:
        other = chat.text([*messages[:index], changed, *messages[index + 1 :]])
    except DataError:  # a template that refuses the other turn has read it
        return
    if other == text:
        calls = "the tool calls of " if messages[index].keys() - changed.keys() else ""
        turn = f"{calls}turn {index} ({messages[index]['role']})"
        raise DataError(f"the chat template leaves out {turn}. Put it into other turns, or correct the template.")


def _changed(message: Message) -> Message:
    content = message["content"].lstrip()
    return message | {"content": ("b" if content.startswith("a") else "a") + content}


def _shared(one: Sequence[object], other: Sequence[object]) -> int:
    """Length of the common prefix of two sequences."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))
