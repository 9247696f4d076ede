"""Which turns of a row are screened, and up to which token."""

import pytest

from peft_safety.errors import DataError
from peft_safety.screening.requests import requests_of
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def requests(row, max_length=1000, labels=()):
    return requests_of(TOKENIZER, row, 7, max_length, labels)


def text(request) -> str:
    return TOKENIZER.decode(request.ids)


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"prompt": "steal", "response": "no"}, "no"),
        ({"prompt": "steal", "completion": "no"}, "no"),
        ({"prompt": "steal"}, None),
        ({"prompt": [turn("user", "steal")], "response": [turn("assistant", "no")]}, "no"),
        ({"messages": [turn("user", "steal"), turn("assistant", "no")]}, "no"),
        ({"messages": [turn("user", "steal")]}, None),
        ({"messages": [turn("user", "steal"), turn("system", "s"), turn("assistant", "no")]}, "no"),
        ({"prompt": None, "messages": [turn("user", "steal"), CALL]}, ""),
    ],
)
def test_a_single_turn(row, answer):
    (request,) = requests(row)
    assert text(request) == "<|im_start|>user\nsteal<|im_end|>\n<|im_start|>assistant\n"
    assert (request.row, request.turn, request.text, request.answer, request.cut) == (7, 0, "steal", answer, False)


def test_a_classification_row_is_asked_as_in_training():
    (request,) = requests({"text": "t", "label": "b"}, labels=["a", "b"])
    assert request.text == "Answer with one of these labels: a, b.\n\nText: t"
    assert request.answer == "b"


def test_each_user_turn_with_all_that_is_before_it():
    """Of user turns in a row the last, which the answer follows."""
    turns = [turn("system", "s"), turn("user", "one"), turn("assistant", "1"), turn("user", "t"), turn("user", "wo")]
    first, second = requests({"messages": [*turns, turn("tool", "x"), turn("assistant", "2")]})
    assert (first.turn, first.text, first.answer) == (1, "one", "1")
    assert (second.turn, second.text, second.answer) == (4, "wo", "2")
    assert text(second).startswith(text(first))
    assert text(second).endswith("wo<|im_end|>\n<|im_start|>assistant\n")


def test_an_answer_belongs_to_the_last_user_turn_before_it():
    turns = [
        turn("user", "one"),
        turn("system", "s"),
        turn("user", "two"),
        turn("system", "s"),
        turn("assistant", "2"),
    ]
    first, second = requests({"messages": turns})
    assert (first.answer, second.answer) == (None, "2")


def test_a_long_row_keeps_its_end():
    (whole,), (request,) = requests({"prompt": "x" * 50}), requests({"prompt": "x" * 50}, max_length=20)
    assert request.cut
    assert request.ids == whole.ids[-20:]


@pytest.mark.parametrize("messages", [[], [turn("assistant", "a")], [turn("system", "s"), turn("assistant", "a")]])
def test_no_user_turn_no_request(messages):
    assert requests({"messages": messages}) == []


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q"}, "row 7: a row has fields"),
        ("text", "row 7: a str instead of a mapping"),
        ({"prompt": 3}, "row 7: turns must be a list"),
        ({"messages": [{"role": "user"}]}, "row 7: a message has"),
        ({"text": "t", "label": "b"}, "row 7: .*Give labels="),
        ({"prompt": "a", "response": " "}, "row 7: the last of the turns"),
        ({"prompt": "cut emoji \ud83d"}, r"row 7: .* half of a character \('\\ud83d'\)"),
    ],
)
def test_malformed_rows_are_named(row, message):
    with pytest.raises(DataError, match=message):
        requests(row)


def test_a_tokenizer_without_a_template_is_refused():
    bare = tiny_tokenizer()
    bare.chat_template = None
    with pytest.raises(DataError, match=r"row 0: the tokenizer has no chat template\. Set"):
        requests_of(bare, {"prompt": "a"}, 0, 10)


def test_template_variables_of_a_row_are_those_of_training():
    thinking = tiny_tokenizer()
    thinking.chat_template = "{{ mode }}" + str(thinking.chat_template)
    row = {"prompt": "a", "chat_template_kwargs": {"mode": "deep", "other": None}}
    (request,) = requests_of(thinking, row, 0, 100)
    assert thinking.decode(request.ids).startswith("deep<|im_start|>user")
    with pytest.raises(DataError, match="row 0: 'chat_template_kwargs' is a str"):
        requests_of(thinking, row | {"chat_template_kwargs": "deep"}, 0, 100)
