"""Rows in context: every kind, by seed, for any template, and unlike what the benchmarks' attacks write."""

from itertools import pairwise

import pytest
from typer.testing import CliRunner

from benchmarks.frontier import attacks
from peft_safety.cli import app
from peft_safety.data import contexts, refusal_pairs
from peft_safety.data.chat import encode_rows
from peft_safety.data.contexts import in_context
from peft_safety.errors import ConfigError, DataError
from peft_safety.recipes.calibrate import calibrate, calibration_cost
from tests.interop.chat_templates import TEMPLATES
from tests.tiny import tiny_llama, tiny_tokenizer

PAIRS = refusal_pairs("calibration", 10)
REQUEST = "What is {this}?"


def texts(row):
    return [turn["content"] for turn in row["prompt"]]


def kind(row):
    """What the prompt's turns show of a context."""
    first, *rest = row["prompt"]
    if first["role"] == "system":
        return "system"
    if rest:
        return "everyday" if texts(row)[0] in dict(contexts.EXCHANGES) else "refusal"
    return "story" if any(who in first["content"] for who in contexts.WHO) else "nonsense"


def test_five_contexts_are_one_of_each_kind():
    rows = in_context([{"prompt": REQUEST, "response": "No."}], 5, seed=3)
    assert len({str(row) for row in rows}) == 5
    assert {kind(row) for row in rows} == set(contexts.KINDS)
    for row in rows:
        assert REQUEST in row["prompt"][-1]["content"], "braces are not read"
        assert row["prompt"][-1]["role"] == "user"
        assert row["response"] == [{"role": "assistant", "content": "No."}]
    assert {kind(row) for row in in_context([{"prompt": REQUEST}] * 5, 1)} == set(contexts.KINDS)


def test_the_seed_decides():
    assert in_context(PAIRS, 3, 1) == in_context(PAIRS, 3, 1)
    assert in_context(PAIRS, 3, 1) != in_context(PAIRS, 3, 2)
    assert in_context(PAIRS, 0) == []
    assert len(in_context(PAIRS, 3)) == 30


def test_the_attacks_texts_are_not_among_the_contexts():
    own = " ".join(text for row in in_context(refusal_pairs("calibration"), 20) for text in texts(row))
    for text in (attacks.TRIGGER, attacks.OBEDIENT, *attacks.FRAME.split("{}"), *attacks.UNSEEN.split("{}")):
        assert not text.strip() or text.strip() not in own


def test_rows_of_every_kind_keep_their_turns_and_columns():
    turns = [{"role": r, "content": c} for r, c in (("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"))]
    rows = [
        {"messages": [*turns, {"role": "assistant", "content": "d"}], "source": "web"},
        {"text": "t", "label": "x"},
        {"prompt": turns},
    ]
    for row in in_context(rows[:1], 5):
        assert (row["response"], row["source"]) == ([{"role": "assistant", "content": "d"}], "web")
        assert row["prompt"][0] == turns[0], "the row's own system prompt stays in front"
        assert row["prompt"][-2]["content"] == "b"
        assert "messages" not in row
    assert "Text: t" in texts(in_context(rows[1:2], 1)[0])[-1]
    assert all("response" not in row for row in in_context(rows[2:], 5))


@pytest.mark.parametrize("first", ["developer", "assistant"])
def test_what_stands_before_the_first_request_stays_in_front(first):
    turns = [{"role": first, "content": "x"}, {"role": "user", "content": "a"}]
    for row in in_context([{"prompt": turns, "response": "b"}], 5):
        order = [turn["role"] for turn in row["prompt"]]
        assert order.index(first) == (order[0] == "system")
        assert first == "assistant" or "system" not in order, "a developer's turn is one of instructions"
        assert all(one != next_one for one, next_one in pairwise(order)), order


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_takes_them(name):
    tokenizer = TEMPLATES[name].tokenizer()
    rows = in_context(PAIRS[:2], 5, tokenizer=tokenizer)
    assert len(encode_rows(tokenizer, rows, 4096)) == 10
    if name == "gemma-2":
        assert not any(turn["role"] == "system" for row in rows for turn in row["prompt"])
        assert any("\n\n" in text for row in rows for text in texts(row))
        with pytest.raises(DataError, match="System role not supported"):
            encode_rows(tokenizer, in_context(PAIRS[:2], 5), 4096)


@pytest.mark.parametrize("count", [-1, contexts.LARGEST + 1, 10**9, 1.5, True, "2"])
def test_a_count_that_is_none(count):
    with pytest.raises(ConfigError, match="contexts of each row"):
        in_context(PAIRS, count)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"input_ids": [1]}, "row 1 is tokenized"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "row 1 has no user turn"),
        ({"question": "q"}, "row 1: a row has fields"),
    ],
)
def test_rows_that_have_no_request(row, said):
    with pytest.raises(DataError, match=said):
        in_context([PAIRS[0], row], 1)


def test_a_calibration_uses_them_and_says_so(tmp_path):
    model, common = tiny_llama(), {"tokenizer": tiny_tokenizer(), "data": PAIRS, "safety_rank": 4, "progress": False}
    bare = calibrate(model, tmp_path / "bare", **common).subspace.provenance
    result = calibrate(model, tmp_path / "in", **common, contexts=2, seed=5).subspace
    assert (bare["samples"], result.provenance["samples"]) == (10, 30)
    assert "contexts" not in bare
    assert type(result).load(tmp_path / "in").provenance["contexts"] == 2
    by_hand = [*PAIRS, *in_context(PAIRS, 2, 5)]
    assert (
        type(result)
        .from_activations(model, by_hand, tokenizer=common["tokenizer"], method="guardspace", rank=4, progress=False)
        .provenance["data"]
        == result.provenance["data"]
    )
    costs = [calibration_cost(model, **common, contexts=count).pass_seconds for count in (0, 20)]
    assert costs[1] > costs[0]


@pytest.mark.parametrize("options", [{"contexts": -1}, {"contexts": 10**6}, {"contexts": 2, "method": "weight"}])
def test_options_that_are_refused_before_a_model_is_loaded(options, tmp_path):
    with pytest.raises(ConfigError, match="contexts"):
        calibrate(tmp_path / "no model", tmp_path / "out", **options)


def test_the_command_has_the_flag(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    given = ["calibrate", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "x"), "--safety-rank", "4"]
    result = CliRunner().invoke(app, [*given, "--contexts", "1", "--json"])
    assert result.exit_code == 0, result.output
    assert '"contexts": 1' in result.stdout
    refused = CliRunner().invoke(app, [*given, "--contexts", "-1"])
    assert refused.exit_code != 0
