"""Our labels are those of TRL's SFTTrainer, on twenty chat templates. The right values are the data sets that the real
trainer prepares.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import ByT5Tokenizer

from peft_safety.data import templates
from peft_safety.data.chat import IGNORE_INDEX, encode_prompts, encode_row, encode_rows
from peft_safety.errors import DataError
from tests.interop.chat_templates import HEADER_WITH_A_SPACE, TEMPLATES
from tests.tiny import tiny_llama

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
LENGTH = 2048
ALL = TEMPLATES | {"a header that ends with a space": HEADER_WITH_A_SPACE}
WITHOUT_SYSTEM = {"gemma-2", "mistral-v0.1", "mistral-v0.3"}
"""Two raise; the third shows the system text to who asks and not to who trains."""
REWRITE_HISTORY = {"qwen3", "gpt-oss"}
KNOWN = {
    "qwen2.5": "qwen2_5",
    "qwen3": "qwen3",
    "llama-3": "llama3",
    "gemma-2": "gemma",
    "gemma-3": "gemma3",
    "phi-3": "phi3",
    "deepseek-v3": "deepseekv3",
    "gpt-oss": "gptoss",
    "glm-4": "glm4moe",
}
"""Templates that TRL has a training template for, with its name for them."""
CALL_TOOLS = {"qwen2.5", "qwen3", "gpt-oss", "glm-4"}


def turn(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def turns(*contents: str) -> list[dict[str, Any]]:
    return [turn(("user", "assistant")[index % 2], content) for index, content in enumerate(contents)]


ASKED = [
    {"prompt": turns("What is the capital of France?"), "completion": [turn("assistant", "Paris")]},
    {
        "prompt": turns("hello there", "hi, how can I help you today?", "Name one more city."),
        "completion": [turn("assistant", " Lyon, Rhône \U0001f600 ")],
    },
    {"prompt": turns("Paris"), "completion": [turn("assistant", "Paris")]},
]
SYSTEM = {
    "prompt": [turn("system", "Answer in one word."), *turns("hello there")],
    "completion": [turn("assistant", "hi")],
}
TALK = {"messages": turns("hello there", "hi, how can I help you today?", "Name one more city.", "Lyon")}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather of a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "where"}},
                "required": ["city"],
            },
        },
    }
]
CALL = {
    "role": "assistant",
    "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}],
}
USES_TOOLS = [
    turn("user", "Weather in Paris?"),
    CALL,
    {"role": "tool", "name": "weather", "content": "sunny"},
    turn("assistant", "It is sunny."),
]


def theirs(
    directory: Path, tokenizer: Any, rows: list[dict[str, Any]], **options: Any
) -> list[tuple[list[int], list[int]]]:
    """Tokens and labels of the data set that TRL's trainer prepares."""
    silent = {"report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True, "save_strategy": "no"}
    arguments = trl.SFTConfig(output_dir=str(directory), max_length=LENGTH, **silent, **options)
    model = tiny_llama(hidden=8, layers=1, vocab=max(600, len(tokenizer)))
    trainer = trl.SFTTrainer(
        model=model, args=arguments, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
    )
    return [(row["input_ids"], row["labels"]) for row in trainer.train_dataset]


def ours(tokenizer: Any, rows: list[dict[str, Any]]) -> list[tuple[list[int], list[int]]]:
    return [(feature["input_ids"], feature["labels"]) for feature in encode_rows(tokenizer, rows, LENGTH)]


def said(tokenizer: Any, labels: list[int]) -> str:
    return str(tokenizer.decode([label for label in labels if label != IGNORE_INDEX]))


@pytest.mark.parametrize("name", ALL)
def test_answers_to_a_prompt(tmp_path: Path, name: str) -> None:
    tokenizer = ALL[name].tokenizer()
    rows = ASKED if name in WITHOUT_SYSTEM else [*ASKED, SYSTEM]
    found = ours(tokenizer, rows)
    assert found == theirs(tmp_path, tokenizer, rows)
    assert all(
        answer in said(tokenizer, labels)
        for (_, labels), answer in zip(found, ["Paris", "Lyon, Rhône \U0001f600", "Paris", "hi"], strict=False)
    )
    if name in WITHOUT_SYSTEM:
        with pytest.raises(DataError, match=r"row 1: .*(system|leaves out|rewrites)"):
            encode_rows(tokenizer, [ASKED[0], SYSTEM], LENGTH)


@pytest.mark.parametrize("name", ALL)
def test_every_answer_of_a_conversation(tmp_path: Path, name: str) -> None:
    """By the template's own marks; and without marks, as most models ship it, the same labels or a refusal that names
    the row.
    """
    marked, plain = ALL[name].tokenizer(ALL[name].marked), ALL[name].tokenizer()
    right = theirs(tmp_path, marked, [TALK], assistant_only_loss=True)
    assert ours(marked, [TALK]) == right
    if name in REWRITE_HISTORY:
        with pytest.raises(DataError, match=r"row 0: .*rewrites turn 1"):
            ours(plain, [TALK])
    else:
        assert ours(plain, [TALK]) == right


@pytest.mark.parametrize("name", KNOWN)
def test_templates_that_trl_trains_with_another_template(tmp_path: Path, name: str) -> None:
    from trl import chat_template_utils

    tokenizer = TEMPLATES[name].tokenizer(getattr(chat_template_utils, f"{KNOWN[name]}_chat_template"))
    assert ours(tokenizer, [TALK]) == theirs(tmp_path, tokenizer, [TALK], assistant_only_loss=True)
    talk = {"messages": USES_TOOLS, "tools": json.dumps(TOOLS)}
    call = {"prompt": USES_TOOLS[:1], "completion": [CALL], "tools": json.dumps(TOOLS)}
    if name in CALL_TOOLS:
        assert ours(tokenizer, [talk]) == theirs(tmp_path, tokenizer, [talk], assistant_only_loss=True)
        assert ours(tokenizer, [call]) == theirs(tmp_path, tokenizer, [call])
        assert "weather" in said(tokenizer, ours(tokenizer, [call | {"tools": TOOLS}])[0][1])
    else:
        for row in (talk, call):
            with pytest.raises(DataError, match="row 0"):
                ours(tokenizer, [row])


def test_without_trl_a_template_that_rewrites_history_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from trl.chat_template_utils import qwen3_chat_template

    tokenizer = TEMPLATES["qwen3"].tokenizer(qwen3_chat_template)
    monkeypatch.setattr(templates, "_training_templates", {})
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(DataError, match="rewrites turn 1"):
        ours(tokenizer, [TALK])


def test_a_tokenizer_written_in_python(tmp_path: Path) -> None:
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = TEMPLATES["zephyr"].plain
    assert ours(tokenizer, [*ASKED, SYSTEM]) == theirs(tmp_path, tokenizer, [*ASKED, SYSTEM])
    assert said(tokenizer, encode_row(tokenizer, TALK, LENGTH)["labels"]).count("</s>") == 2
    tokenizer.chat_template = TEMPLATES["zephyr"].marked
    assert said(tokenizer, encode_row(tokenizer, TALK, LENGTH)["labels"]).count("</s>") == 2


def test_options_of_the_template(tmp_path: Path) -> None:
    tokenizer = TEMPLATES["qwen3"].tokenizer()
    row = ASKED[0] | {"chat_template_kwargs": {"enable_thinking": False}}
    found = ours(tokenizer, [row])
    assert found == theirs(tmp_path, tokenizer, [row])
    assert said(tokenizer, found[0][1]) == "Paris<|im_end|>\n"


@pytest.mark.parametrize("name", ALL)
def test_a_cut_off_answer_is_not_taught_to_end(name: str) -> None:
    tokenizer = ALL[name].tokenizer()
    row = {"prompt": turns("hello there"), "response": "hi, how can I help yo", "truncated": True}
    feature = encode_row(tokenizer, row, LENGTH)
    assert said(tokenizer, feature["labels"]).endswith("hi, how can I help yo")


@pytest.mark.parametrize("name", ALL)
def test_the_first_turn_is_the_assistants(name: str) -> None:
    tokenizer = ALL[name].tokenizer()
    try:
        talk = [turn("assistant", "hi, how can I help?"), *turns("hello there", "Paris")]
        feature = encode_row(tokenizer, {"messages": talk}, LENGTH)
    except DataError:
        assert name in {
            "gemma-2",
            "gemma-3",
            "mistral-v0.1",
            "mistral-v0.3",
            "mistral-tekken",
            "deepseek-v3",
            "gpt-oss",
        }
        return
    found = said(tokenizer, feature["labels"])
    assert "hi, how can I help?" in found
    assert "Paris" in found
    assert "hello there" not in found


@pytest.mark.parametrize("name", ALL)
def test_the_first_token_is_never_doubled(name: str) -> None:
    tokenizer = ALL[name].tokenizer()
    ids = encode_row(tokenizer, ASKED[0], LENGTH)["input_ids"]
    assert ids[:2].count(tokenizer.bos_token_id) <= 1
    asked = encode_prompts(tokenizer, [{"prompt": ASKED[0]["prompt"]}], LENGTH)[0]["input_ids"]
    assert ids[: len(asked) - 3] == asked[:-3]
