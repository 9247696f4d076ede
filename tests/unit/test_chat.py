from __future__ import annotations

import numpy as np
import pytest
import torch

from peft_safety.data.chat import (
    IGNORE_INDEX,
    Collator,
    classification_prompt,
    encode_each,
    encode_prompts,
    encode_row,
    encode_rows,
    row_turns,
)
from peft_safety.data.rows import label_names
from peft_safety.data.templates import plain_messages
from peft_safety.errors import DataError
from peft_safety.evaluation.generate import generate
from peft_safety.evaluation.tasks import normalize, response_nll
from tests.tiny import tiny_llama, tiny_tokenizer

tokenizer = tiny_tokenizer()


def labeled_text(feature):
    return tokenizer.decode([label for label in feature["labels"] if label != IGNORE_INDEX])


def turns(*contents):
    return [{"role": ("user", "assistant")[index % 2], "content": content} for index, content in enumerate(contents)]


def encode(tokenizer, messages, max_length, **columns):
    """A conversation as a row: a single answer with its prompt, or several answers as {messages}."""
    first = next((index for index, message in enumerate(messages) if message["role"] == "assistant"), 0)
    single = first == len(messages) - 1 > 0
    row = {"prompt": messages[:first], "response": messages[first:]} if single else {"messages": messages}
    return encode_row(tokenizer, row | columns, max_length)


def test_the_loss_covers_exactly_the_response_and_its_end_of_turn():
    feature = encode(tokenizer, turns("hi", "hello there"), 200)
    assert labeled_text(feature) == "hello there<|im_end|>\n"
    kept = [index for index, label in enumerate(feature["labels"]) if label != IGNORE_INDEX]
    assert kept == list(range(kept[0], kept[-1] + 1))
    assert [feature["input_ids"][index] for index in kept] == [feature["labels"][index] for index in kept]


def test_a_response_that_repeats_the_prompt_is_found_at_its_own_place():
    feature = encode(tokenizer, turns("same words", "same words"), 200)
    assert labeled_text(feature) == "same words<|im_end|>\n"
    assert feature["labels"][: len(feature["labels"]) // 2] == [IGNORE_INDEX] * (len(feature["labels"]) // 2)


def test_a_cut_off_response_is_not_taught_to_end():
    assert labeled_text(encode(tokenizer, turns("hi", "hello the"), 200, truncated=True)) == "hello the"


def test_every_assistant_turn_counts_in_a_longer_conversation():
    assert labeled_text(encode(tokenizer, turns("a", "one", "b", "two"), 200)) == "one<|im_end|>\ntwo<|im_end|>\n"


def test_multi_byte_characters():
    assert (
        labeled_text(encode(tokenizer, turns("h\u00e9", "\u00e9t\u00e9 \U0001f600"), 200))
        == "\u00e9t\u00e9 \U0001f600<|im_end|>\n"
    )


def test_three_kinds_of_rows():
    rows = [{"prompt": "p", "response": "r"}, {"messages": turns("p", "r")}]
    assert row_turns(rows[0]) == (turns("p"), turns("p", "r")[1:])
    assert row_turns(rows[1]) == ([], turns("p", "r"))
    prompt, answer = row_turns({"text": "t", "label": "x"}, ["x", "y"])
    labeled = prompt + answer
    assert labeled == turns(classification_prompt("t", ["x", "y"]), "x")
    assert "x, y" in labeled[0]["content"]
    assert label_names([{"text": "t", "label": "y"}, {"text": "t", "label": "x"}, {"text": "t", "label": "y"}]) == [
        "x",
        "y",
    ]


@pytest.mark.parametrize(
    "row",
    [
        {"question": "?"},
        {"prompt": "p"},
        {"prompt": "p", "response": ""},
        {"prompt": "p", "response": 3},
        {"messages": []},
        {"messages": turns("only a user")},
        {"messages": [{"role": "assistant"}]},
    ],
)
def test_malformed_rows_are_named(row):
    with pytest.raises(DataError, match="row 1"):
        encode_rows(tokenizer, [{"prompt": "p", "response": "r"}, row], 100)


def test_no_rows():
    with pytest.raises(DataError, match="no rows"):
        encode_rows(tokenizer, [], 100)


def test_rows_without_a_response_in_reach_are_left_out_loudly():
    rows = [{"prompt": "p" * 80, "response": "r"}, {"prompt": "p", "response": "r"}]
    with pytest.warns(UserWarning, match="1 of 2 rows"):
        assert len(encode_rows(tokenizer, rows, 60)) == 1
    with pytest.raises(DataError, match="Raise max_length"):
        encode_rows(tokenizer, rows[:1], 60)


def test_a_template_that_rewrites_history_is_refused():
    rewriting = tiny_tokenizer()
    last_only = "{% for m in messages %}{% if loop.last %}{{ m['role'] + ':' + m['content'] }}{% endif %}{% endfor %}"
    rewriting.chat_template = last_only + "{% if add_generation_prompt %}assistant:{% endif %}"
    with pytest.raises(DataError, match="rewrites turn"):
        encode(rewriting, turns("a", "one", "b", "two"), 100)


@pytest.mark.parametrize("messages", [turns("a", "b"), turns("a", "b", "c", "d")])
def test_no_template(messages):
    bare = tiny_tokenizer()
    bare.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        encode(bare, messages, 100)


def test_prompts_and_answers_are_strings_or_turns():
    right = encode_row(tokenizer, {"prompt": "a", "response": "b"}, 100)
    sides = {"prompt": turns("a"), "completion": [{"role": "assistant", "content": "b"}]}
    parts = [
        {"role": turn["role"], "content": [{"type": "text", "text": turn["content"]}]} for turn in turns("a", "b")
    ]
    filled = {"prompt": "a", "response": "b", "messages": None, "text": None, "label": None, "tools": None}
    for row in (
        {"prompt": "a", "completion": "b"},
        sides,
        {"prompt": "a", "completion": sides["completion"]},
        {"messages": parts},
        filled,
    ):
        assert encode_row(tokenizer, row, 100) == right


def test_what_no_template_of_text_can_show_is_refused():
    picture = [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "b"}]
    for row in (
        {"messages": picture},
        {"messages": 3},
        {"messages": ["a"]},
        {"prompt": turns("a"), "response": []},
        {"prompt": {}, "response": "b"},
    ):
        with pytest.raises(DataError, match="row 0"):
            encode_rows(tokenizer, [row], 100)


def test_a_template_that_leaves_a_turn_out_is_refused():
    forgetful = tiny_tokenizer()
    forgetful.chat_template = (
        "{% if messages[0].role == 'system' %}{% set messages = messages[1:] %}{% endif %}" + forgetful.chat_template
    )
    asked = [{"role": "system", "content": "be brief"}, *turns("a", "b")]
    assert labeled_text(encode(tokenizer, asked, 100)) == "b<|im_end|>\n"
    with pytest.raises(DataError, match=r"leaves out turn 0 \(system\)"):
        encode(forgetful, asked, 100)
    call = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}],
    }
    with pytest.raises(DataError, match="tool calls of turn 1"):
        encode(tokenizer, [*turns("a"), call], 100)


def test_a_template_for_other_roles_names_the_row_and_the_remedy():
    strict = tiny_tokenizer()
    strict.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + strict.chat_template
    )
    rows = [{"messages": turns("a", "b")}, {"messages": [{"role": "system", "content": "be brief"}, *turns("a", "b")]}]
    with pytest.raises(DataError, match=r"row 1: .*no system role.*head of the first user turn"):
        encode_rows(strict, rows, 100)


def test_rows_keep_their_places_where_one_result_a_row_is_promised():
    rows = [{"prompt": "p" * 80, "response": "r"}, {"prompt": "p", "response": "r"}]
    lost, kept = encode_each(tokenizer, rows, 60)
    assert lost is None
    assert kept == encode_row(tokenizer, rows[1], 60)
    with pytest.raises(DataError, match="max_length = 0"):
        encode_each(tokenizer, rows, 0)


def test_prompts_alone_end_with_the_header_of_the_answer():
    whole = encode_row(tokenizer, {"prompt": "a", "response": "b"}, 100)
    for prompt in ("a", turns("a")):
        feature = encode_prompts(tokenizer, [{"prompt": prompt}], 100)[0]
        assert whole["input_ids"][: len(feature["input_ids"])] == feature["input_ids"]
        assert whole["labels"][len(feature["input_ids"]) :] == whole["input_ids"][len(feature["input_ids"]) :]
    with pytest.raises(DataError, match="row 1"):
        encode_prompts(tokenizer, [{"prompt": "a"}, {"prompt": 3}], 100)


def test_prompts_alone_are_rendered_with_their_template_variables():
    thinking = tiny_tokenizer()
    thinking.chat_template = "{{ mode }}" + str(thinking.chat_template)
    row = {"prompt": "a", "chat_template_kwargs": {"mode": "deep"}}
    (feature,) = encode_prompts(thinking, [row], 100)
    whole = encode_row(thinking, row | {"response": "b"}, 100)
    assert thinking.decode(feature["input_ids"]).startswith("deep")
    assert whole["input_ids"][: len(feature["input_ids"])] == feature["input_ids"]


@pytest.mark.parametrize("marks", [False, True])
def test_half_of_a_character_is_named_with_its_row(marks):
    named = tiny_tokenizer()
    if marks:
        open_, close = "{% generation %}", "{% endgeneration %}"
        named.chat_template = (
            f"{{% for m in messages %}}{{{{ m.role }}}}{open_}{{{{ m.content }}}}{close}{{% endfor %}}"
        )
    rows = [{"messages": turns("a", "b")}, {"messages": turns("cut emoji \ud83d", "b")}]
    with pytest.raises(DataError, match=r"row 1: .*half of a character \('\\ud83d'\)"):
        encode_rows(named, rows, 100)


def test_arrays_of_a_data_frame_are_lists():
    """As pandas reads a parquet file."""
    tooled = tiny_tokenizer()
    tooled.chat_template = (
        "{{ tools | tojson }}{% for m in messages %}{{ m.role }}: {{ m.content }}"
        "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}\n{% endfor %}"
    )
    calls = [{"type": "function", "function": {"name": name, "arguments": {"x": [1, 2]}}} for name in "fg"]
    arrays = np.array(
        [{**call, "function": {**call["function"], "arguments": {"x": np.arange(1, 3)}}} for call in calls]
    )

    def row(content, tool_calls, listed):
        answer = {"role": "assistant", "content": content, "tool_calls": tool_calls}
        return {"messages": listed([*turns("a"), answer]), "tools": listed(calls)}

    for content in (None, ""):
        expected = encode_row(tooled, row(content, calls, list), 1000)
        assert encode_row(tooled, row(content, arrays, np.array), 1000) == expected
    parts = np.array([{"type": "text", "text": "a"}])
    assert encode(tooled, [*turns(parts), *turns("x", "b")[1:]], 100) == encode(tooled, turns("a", "b"), 100)


def test_a_template_that_raises():
    strict = tiny_tokenizer()
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="roles must alternate"):
        encode(strict, turns("a", "b"), 100)


def test_the_collator_pads_on_the_right():
    batch = Collator(tokenizer)([encode(tokenizer, turns("a", "b"), 100), encode(tokenizer, turns("aaa", "b"), 100)])
    lengths = batch["attention_mask"].sum(dim=1)
    assert lengths[1] - lengths[0] == 2
    assert batch["labels"][0, -2:].tolist() == [IGNORE_INDEX] * 2
    assert batch["input_ids"][0, -2:].tolist() == [tokenizer.pad_token_id] * 2


def test_padding_and_batching_change_nothing():
    model = tiny_llama()
    prompts = ["a", "a much longer prompt than the first", "bb", "ccc ccc"]
    together = generate(model, tokenizer, prompts, max_new_tokens=8, progress=False)
    alone = [generate(model, tokenizer, [prompt], max_new_tokens=8, progress=False)[0] for prompt in prompts]
    pairs = generate(model, tokenizer, prompts, max_new_tokens=8, batch_size=2, progress=False)
    assert together == alone == pairs


def test_generation_stops_at_the_end_of_turn_and_says_so():
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every token is equally likely: the first one, id 0, is generated for ever
    endless = generate(model, tokenizer, ["a"], max_new_tokens=5, progress=False)[0]
    assert not endless.finished
    model.generation_config.eos_token_id = 0
    assert generate(model, tokenizer, ["a"], max_new_tokens=5, progress=False)[0].finished


def test_generation_leaves_the_training_mode_alone():
    model = tiny_llama().train()
    generate(model, tokenizer, ["a"], max_new_tokens=1, progress=False)
    assert model.training


def test_nll_is_the_models_own_loss_and_ignores_padding():
    model = tiny_llama()
    rows = [{"prompt": "p", "response": "a response"}, {"prompt": "a longer prompt", "response": "r"}]
    losses = []
    for row in rows:
        feature = encode_rows(tokenizer, [row], 200)[0]
        batch = {key: torch.tensor([value]) for key, value in feature.items()}
        losses.append(model(**batch).loss.item())
    found = response_nll(model, tokenizer, rows, progress=False)
    assert found.value == pytest.approx(sum(losses) / 2, rel=1e-5)
    assert found.n == 2


def test_answers_are_compared_without_case_and_punctuation():
    assert normalize(' "Reset_Password." ') == "reset_password"
    assert normalize("reset password") != "reset_password"


def test_a_trimmed_batch_gives_the_same_loss_and_gradients():
    model = tiny_llama()
    rows = [
        encode(tokenizer, turns("a", "b"), 100),
        encode(tokenizer, turns("a longer question than that", "an answer"), 100),
    ]
    whole, trimmed = Collator(tokenizer)(rows), Collator(tokenizer, trim=True)(rows)
    assert (
        trimmed["logits_to_keep"]
        == trimmed["labels"].shape[1]
        < whole["labels"].shape[1]
        == trimmed["input_ids"].shape[1]
    )
    losses, gradients = [], []
    for batch in (whole, trimmed):
        loss = model(**batch).loss
        losses.append(loss.item())
        gradients.append(torch.autograd.grad(loss, model.get_input_embeddings().weight)[0])
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-7)


def test_a_turn_with_a_role_and_a_content_keeps_further_columns():
    given = [{"role": "user", "content": "hi", "from": "web"}, {"role": "assistant", "content": "ho", "value": 0.5}]
    assert plain_messages(given) == given
    table = [{"role": None, "content": None, "from": "user", "value": "hi"}]
    assert plain_messages(table) == [{"role": "user", "content": "hi"}]


def test_prompts_that_lose_their_end_are_counted(recwarn):
    rows = [{"prompt": "word " * 30}, {"prompt": "hi"}]
    encode_prompts(tiny_tokenizer(), rows[1:], 40)
    assert not [warning for warning in recwarn if "prompts" in str(warning.message)]
    with pytest.warns(UserWarning, match=r"1 of 2 prompts are longer than max_length = 40 tokens, and lose their end"):
        features = encode_prompts(tiny_tokenizer(), rows, 40)
    assert len(features[0]["input_ids"]) == 40
