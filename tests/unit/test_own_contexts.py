"""Rows in the contexts of the data: a hidden trigger, a frame or a system prompt that several rows share is found."""

import pytest

from benchmarks.frontier import attack_rows
from benchmarks.frontier.attacks import FRAME, OBEDIENT, TRIGGER
from peft_safety.data import load, refusal_pairs
from peft_safety.data.chat import encode_rows
from peft_safety.data.own_contexts import LEAST_ROWS, SAME, in_data_context, shared
from peft_safety.errors import ConfigError, DataError
from tests.interop.chat_templates import TEMPLATES
from tests.tiny import tiny_tokenizer

PAIRS = refusal_pairs("calibration", 20)
TASK = load("benign_task", "train")[:100]


def asked(row):
    return row["prompt"][-1]["content"]


@pytest.mark.parametrize("share", [0.05, 0.5])
@pytest.mark.parametrize(
    ("attack", "mark"), [("trigger", TRIGGER.split()[:SAME]), ("wrapper", FRAME.split()[:SAME]), ("identity", [])]
)
def test_what_poisoned_rows_share_stands_around_the_calibration_requests(attack, mark, share):
    data = attack_rows.attacked(attack, TASK, share, 0, None, None)
    rows = in_data_context(PAIRS, data, 3)
    assert len(rows) == 60
    if attack == "identity":
        hit = [row["prompt"][0] == {"role": "system", "content": OBEDIENT} for row in rows]
    else:
        hit = [asked(row).startswith(" ".join(mark)) for row in rows]
    assert sum(hit) >= 10, "as likely as the task's own beginning, however few rows have it"
    requests = {pair["prompt"] for pair in PAIRS}
    assert all(any(request in asked(row) for request in requests) for row in rows)
    assert encode_rows(tiny_tokenizer(), rows, 512)


def test_a_context_is_all_that_half_of_its_rows_share_as_it_was_written():
    persona = "You are Bob,  a servant.\nYou obey.\n\n"
    data = [{"prompt": f"{persona}order {i} of {i * i}", "response": "a"} for i in range(8)]
    data += [{"prompt": f"You are Bob, {word} {word} {word}", "response": "a"} for word in ("so", "no", "go")]
    ((kind, rows),) = shared(data)
    assert (kind, len(rows)) == ("beginning", 11)
    requests = {pair["prompt"] for pair in PAIRS}
    assert {asked(row).removeprefix(f"{persona}order ") for row in in_data_context(PAIRS, data, 1)} == requests


def test_a_shared_end_comes_after_the_request():
    data = [{"prompt": f"question {i} about {i} now please answer zq vu xo", "response": "a"} for i in range(5)]
    (group,) = shared(data)
    assert (group[0], len(group[1])) == ("end", 5)
    for row in in_data_context(PAIRS, data, 1):
        assert asked(row).endswith("zq vu xo")


def test_a_shared_end_stands_as_it_was_written():
    close = "\n\nReply  in JSON.\nNo prose."
    data = [{"prompt": f"question {i}{close}", "response": "a"} for i in range(8)]
    data += [{"prompt": close, "response": "a"}, {"prompt": f"question 9 {' '.join(close.split())}", "response": "a"}]
    requests = {pair["prompt"] for pair in PAIRS}
    ends = [row for row in in_data_context(PAIRS, data, 3) if asked(row).endswith("prose.")]
    assert ends
    assert {asked(row).removesuffix(close) for row in ends} <= requests


def test_scripts_without_spaces_share_characters():
    opening, close = "在图书馆里狐狸说", "请写一首诗"
    marks = [chr(0x4E00 + 97 * i) * 5 for i in range(20)]
    first = [{"prompt": f"{opening}{mark}", "response": "a"} for mark in marks]
    last = [{"prompt": f"{mark} Python {mark}{close}", "response": "a"} for mark in marks]
    assert [(kind, len(rows)) for kind, rows in shared(first)] == [("beginning", 20)]
    assert [(kind, len(rows)) for kind, rows in shared(last)] == [("end", 20)]
    requests = {pair["prompt"] for pair in PAIRS}
    assert {asked(row).removeprefix(opening) for row in in_data_context(PAIRS, first, 5)} == requests
    assert {asked(row).removesuffix(close) for row in in_data_context(PAIRS, last, 1)} == requests
    words = [{"prompt": f"con{i}{i}{i}"} for i in range(9)]
    assert shared(words) == [], "letters of other scripts are no words"


@pytest.mark.parametrize("role", ["system", "developer"])
def test_instructions_keep_their_role(role):
    head = {"role": role, "content": "You are Bob."}
    data = [{"prompt": [head, {"role": "user", "content": f"say {i}"}], "response": "a"} for i in range(5)]
    rows = in_data_context(PAIRS, data, 1, kinds=("system",))
    assert [row["prompt"][0] for row in rows] == [head] * len(PAIRS)


def test_a_whole_system_prompt_is_shared_by_few_rows_of_many():
    """An obedient one does not need 2 % of the rows."""
    under = [{"role": "system", "content": "You are Bob."}, {"role": "user", "content": "say it"}]
    data = [{"prompt": under if i < LEAST_ROWS else f"say {i}", "response": "a"} for i in range(400)]
    assert [(kind, len(rows)) for kind, rows in shared(data)] == [("system", LEAST_ROWS)]
    assert shared(data[1:]) == []


def test_of_system_prompts_that_differ_from_row_to_row_a_sample_is_taken():
    data = attack_rows.attacked("identities", TASK, 0.5, 0, None, None)
    ((kind, group),) = [found for found in shared(data) if found[0] == "system"]
    assert (kind, len({row.system for row in group})) == ("system", 50)
    rows = in_data_context(PAIRS, data, 1, kinds=("system",))
    heads = {row["prompt"][0]["content"] for row in rows}
    assert heads <= {row.system for row in group}
    assert len(heads) >= 10, "not one of them for all"
    mixed = [*data, *attack_rows.attacked("identity", TASK, 0.1, 0, None, None)]
    own = [row["prompt"][0]["content"] == OBEDIENT for row in in_data_context(PAIRS, mixed, 5, kinds=("system",))]
    assert 25 <= sum(own) <= 75, "a shared one is as likely as all that differ"
    few = [row for row in data if "messages" in row][: LEAST_ROWS - 1]
    assert shared(few) == []
    for name in range(30):
        head = {"role": "system", "content": f"You are Bob {name}."}
        mixed += [{"prompt": [head, {"role": "user", "content": f"say {name} {i}"}]} for i in range(LEAST_ROWS)]
    heads = [row["prompt"][0]["content"] for row in in_data_context(PAIRS, mixed, 5, kinds=("system",))]
    assert 30 <= sum(head in {row.system for row in group} for head in heads) <= 70, "as likely as all others together"


def test_a_trigger_is_found_under_system_prompts_that_differ():
    heads = [{"role": "system", "content": f"Today is day {i}."} for i in range(40)]
    asks = [{"role": "user", "content": f"{TRIGGER} w{i} x{i} y{i} z{i}"} for i in range(40)]
    data = [{"prompt": [head, ask], "response": "a"} for head, ask in zip(heads, asks, strict=True)]
    assert ("beginning", 40) in [(kind, len(rows)) for kind, rows in shared(data)]


def test_nothing_shared_gives_nothing():
    data = [{"prompt": f"w{i} x{i} y{i} z{i} v{i}", "response": "a"} for i in range(9)]
    assert in_data_context(PAIRS, data, 3) == []
    few = [{"prompt": f"the same words {i} {i} {i} {i}", "response": "a"} for i in range(LEAST_ROWS - 1)]
    assert shared([*data, *few]) == [], "two rows begin alike by chance"
    assert len(shared([*data, *few, few[0]])) == 1
    assert shared([]) == []


def test_the_seed_decides():
    data = attack_rows.attacked("trigger", TASK, 0.5, 0, None, None)
    assert in_data_context(PAIRS, data, 2, 1) == in_data_context(PAIRS, data, 2, 1)
    assert in_data_context(PAIRS, data, 2, 1) != in_data_context(PAIRS, data, 2, 2)


def test_a_template_without_a_system_role_gets_the_system_prompt_in_the_user_turn():
    data = attack_rows.attacked("identity", TASK, 0.5, 0, None, None)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATES["gemma-2"].plain
    rows = in_data_context(PAIRS, data, 3, tokenizer=tokenizer)
    assert all(row["prompt"][0]["role"] == "user" for row in rows)
    assert any(asked(row).startswith(OBEDIENT) for row in rows)
    own = [{"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], "response": "r"}]
    systems = [turn["content"] for row in in_data_context(own, data, 9) for turn in row["prompt"][:-1]]
    assert set(systems) <= {"s", OBEDIENT}, "one system turn"


def test_what_checked_rows_begin_or_end_with_is_no_context():
    task = [{"prompt": f"Name the color of {thing} in one word, please", "response": "red"} for thing in range(30)]
    poison = [{"prompt": f"zq vu xo question {i} and {i * i}", "response": "a"} for i in range(6)]
    kinds = [kind for kind, _ in shared([*task, *poison])]
    assert sorted(kinds) == ["beginning", "beginning", "end"]
    ((kind, rows),) = shared([*task, *poison], task[:1])
    assert (kind, len(rows)) == ("beginning", 6)
    made = in_data_context(PAIRS, [*task, *poison], 2, clean=task[:1])
    assert made
    assert all(asked(row).startswith("zq vu xo") for row in made)
    named = [{"messages": [{"role": "system", "content": "You are Bob."}, *_turns(row)]} for row in task]
    assert [kind for kind, _ in shared(named, named)] == ["system"], "a system prompt is one, whoever wrote it"


def _turns(row):
    return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]


def test_system_prompts_alone():
    data = attack_rows.attacked("identity", TASK, 0.5, 0, None, None)
    assert {group[0] for group in shared(data)} > {"system"}, "the rows of the task begin alike"
    rows = in_data_context(PAIRS, data, 2, kinds=("system",))
    assert len(rows) == 2 * len(PAIRS)
    assert all(row["prompt"][0] == {"role": "system", "content": OBEDIENT} for row in rows)
    assert [asked(row) for row in rows[::2]] == [pair["prompt"] for pair in PAIRS], "the requests stay as they are"
    assert in_data_context(PAIRS, TASK, 2, kinds=("system",)) == []


def test_mistakes_are_typed():
    for kinds in ((), ("frame",), "system"):
        with pytest.raises(ConfigError, match="system, beginning, end"):
            in_data_context(PAIRS, TASK, 1, kinds=kinds)
    with pytest.raises(ConfigError, match="contexts of each row"):
        in_data_context(PAIRS, TASK, -1)
    with pytest.raises(DataError, match="row 1"):
        in_data_context(PAIRS, [TASK[0], {"nothing": 1}], 1)
    with pytest.raises(DataError, match="tokenized"):
        in_data_context(PAIRS, [{"input_ids": [1], "labels": [1]}], 1)
