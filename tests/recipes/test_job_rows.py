"""What becomes of a job's rows between the file and the trainer: labels, cuts, rows that are lost or refused."""

from __future__ import annotations

import datasets
import pytest
import trl
from datasets import arrow_dataset
from datasets.fingerprint import update_fingerprint

import peft_safety
from peft_safety.errors import ConfigError, DataError
from peft_safety.recipes.job.data import _converted, feature
from peft_safety.recipes.job.job import Job
from peft_safety.recipes.job.plan import make_plan
from peft_safety.recipes.job.run import run_job
from peft_safety.recipes.job.settings import Settings
from tests.recipes.jobs import PAIRS, job_on
from tests.recipes.test_job_data import ASSISTANT, FORMATS, TOOL, USER, read
from tests.tiny import CHAT_TEMPLATE, tiny_llama, tiny_tokenizer

ASKED = [
    {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"it is {i}"}]}
    for i in range(12)
]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def settings(folder, rows, **more):
    return Settings.of(**job_on(folder, rows, **more))


def prepared(folder, rows, tokenizer, **more):
    """The rows as TRL prepares them."""
    arguments = trl.SFTConfig(output_dir=str(folder / "out"), use_cpu=True, bf16=False, report_to="none", **more)
    return trl.SFTTrainer(tiny_llama(), arguments, train_dataset=rows, processing_class=tokenizer).train_dataset


@pytest.mark.parametrize("kind", ["text", "strings", "tokens"])
def test_rows_without_turns_are_not_screened(tmp_path, kind):
    rows, only = [FORMATS[kind]] * 9, {"method": "lora", "skip": ["train", "measure", "verify", "report"]}
    with pytest.raises(ConfigError, match="drop_flagged needs rows of chat"):
        Job(settings(tmp_path, rows, screened=True, drop_flagged=True, **only))
    with pytest.warns(UserWarning, match="not screened: .* a chat template has written"):
        run_job(settings(tmp_path, rows, screened=True, **only))


def test_rows_that_are_cut_before_their_answer_are_not_counted(tmp_path):
    rows = [row | {"prompt": row["prompt"] + "?" * 300 * (i % 2)} for i, row in enumerate(PAIRS)]
    quick = {"method": "lora", "held_out": 0, "max_steps": 1, "skip": ["measure"]}
    with pytest.warns(UserWarning, match="10 of 20 rows: no token to train on within max_length=99"):
        facts = run_job(settings(tmp_path, rows, max_length=99, **quick)).facts["train"]
    assert facts["rows"] == 10
    with pytest.raises(DataError, match="none of the 20 rows has a token to train on"):
        run_job(settings(tmp_path, rows, max_length=9, **quick))


def test_a_conversation_may_end_in_any_turn(tmp_path):
    rows = [{"messages": [*row["messages"], *USER * (i == 5)]} for i, row in enumerate(ASKED)]
    quick = {"held_out": 0, "safety_rank": 4, "max_steps": 1, "skip": ["measure"]}
    result = run_job(settings(tmp_path, rows, **quick))
    assert (result.facts["train"]["rows"], result.facts["verify"]["worst_leak"] < 1e-5) == (12, True)


def test_rows_without_an_answer_are_counted_and_alone_refused(tmp_path, capsys):
    rows = [{"messages": row["messages"][: 1 if i < 4 else 2]} for i, row in enumerate(ASKED)]
    quick = {"method": "lora", "held_out": 0}
    note = "4 of 12 rows have no answer: TRL trains on the user's words"
    assert make_plan(settings(tmp_path, rows, **quick)).facts["without an answer"] == note
    run_job(settings(tmp_path, rows, skip=["train", "measure", "verify", "report"], **quick))
    assert note in capsys.readouterr().out
    assert "without an answer" not in make_plan(settings(tmp_path, ASKED, **quick)).facts
    humans = [{"conversations": [{"from": who, "value": "hi"} for who in ("human", "gpt")]}]
    for bad in (rows[:4], humans * 4):
        with pytest.raises(DataError, match=r"none of the 4 rows has an answer.*Name the roles user and assistant"):
            Job(settings(tmp_path, bad, **quick))


def test_rows_that_assistant_only_loss_cannot_take_are_refused_before_the_work(tmp_path):
    """TRL refuses a row without a turn of the assistant; one that is blank has its end."""
    template = tmp_path / "marked.jinja"
    turn = "{{ message['content'] + '<|im_end|>' }}"
    template.write_text(
        "{% for message in messages %}{{ message['role'] }}: {% if message['role'] == 'assistant' %}"
        f"{{% generation %}}{turn}{{% endgeneration %}}{{% else %}}{turn}{{% endif %}}{{% endfor %}}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    more = {"method": "lora", "assistant_only_loss": True, "chat_template_path": str(template), "held_out": 0}
    rows = [{"messages": [*row["messages"][:1], *ASSISTANT * (i != 5)]} for i, row in enumerate(ASKED)]
    with pytest.raises(DataError, match=r"1 of 12 rows have no turn of the role 'assistant'"):
        Job(settings(tmp_path, rows, **more))
    halves = [{**row, "split": "train" if "assistant" in str(row) else "test"} for row in rows]
    Job(settings(tmp_path, halves, **more, skip=["measure"]))
    with pytest.raises(DataError, match=r"1 of 1 rows have no turn"):
        Job(settings(tmp_path, halves, **more, skip=["measure"], eval_strategy="steps", eval_steps=1))
    rows[5] = {"messages": [*rows[5]["messages"], {"role": "assistant", "content": ""}]}
    result = run_job(settings(tmp_path, rows, **more, skip=["calibrate", "measure", "verify", "report"]))
    assert result.facts["train"]["rows"] == 12


def test_a_model_without_a_chat_template_can_be_given_one(tmp_path):
    given = settings(tmp_path, ASKED, method="lora")
    bare = tiny_tokenizer()
    bare.chat_template = None
    bare.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(DataError, match=r"no chat template\. Give chat_template_path"):
        Job(given)


def test_what_follows_the_last_answer_has_no_label():
    tokenizer = tiny_tokenizer()

    def labeled(turns):
        labels = feature(tokenizer, {"messages": turns}, "text")["labels"]
        return tokenizer.decode([label for label in labels if label != -100])

    silent = [{"role": "assistant", "content": ""}]
    for after in ([], USER, silent, USER + silent):
        assert labeled(USER + ASSISTANT + after) == "ho<|im_end|>\n"
    assert labeled(USER) == "<|im_start|>user\nhi<|im_end|>\n", "as TRL, which labels all turns"


@pytest.mark.parametrize(("more", "kind"), [({"held_out": 0}, "training row 7"), ({"held_out": 0.9}, "held-out row")])
def test_a_row_that_the_template_refuses_is_named_before_a_model_is_loaded(tmp_path, more, kind):
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHAT_TEMPLATE
    )
    rows = [{"messages": [{"role": "system", "content": "Be Bob."}, *ASKED[7]["messages"]]}]
    rows = [*ASKED[:7], *rows * (5 if more["held_out"] else 1), *ASKED[8:]]
    with pytest.raises(DataError, match=f"{kind}.*refuses turns"):
        Job(settings(tmp_path, rows, chat_template_path=str(template), eval_limit=None, **more))


def test_only_some_rows_have_tools_or_variables(tmp_path):
    rows = [{"messages": USER + ASSISTANT} for _ in range(1003)]  # `datasets` writes 1,000 at once
    rows[-1] |= {"tools": [TOOL], "chat_template_kwargs": {"loud": True}}
    rows[-2] |= {"tools": [TOOL]}
    data, tokenizer = read(tmp_path, rows).train, tiny_tokenizer()
    tokenizer.chat_template = "{{ '[tools]' if tools is not none }}{{ '[loud]' if loud }}" + CHAT_TEMPLATE
    last = data.select(range(1000, 1003))
    ours = [feature(tokenizer, row, "text")["input_ids"] for row in last]
    assert ours == prepared(tmp_path, last, tokenizer)["input_ids"]
    heads = [tokenizer.decode(ids).partition("<|im_start|>")[0] for ids in ours]
    assert heads == ["", "[tools]", "[tools][loud]"]
    assert len(prepared(tmp_path, read(tmp_path, rows[-20:], poison=0.5).train, tokenizer)) == 20


def test_masks_of_tokens_say_what_has_a_label(tmp_path):
    row = {"input_ids": [5, 6, 7, 8], "completion_mask": [0, 1, 1, 1], "assistant_masks": [1, 1, 0, 1]}
    data, tokenizer = read(tmp_path, [row] * 3).train, tiny_tokenizer()
    for only, labels in ((True, [-100, 6, -100, 8]), (None, [5, 6, -100, 8])):
        assert feature(tokenizer, data[0], "text", only)["labels"] == labels
        assert prepared(tmp_path / str(only), data, tokenizer, completion_only_loss=only)["labels"][0] == labels
    with pytest.raises(DataError, match="several lengths"):
        feature(tokenizer, {**row, "completion_mask": [0, 1]}, "text", True)


@pytest.mark.parametrize(("mode", "kept"), [("keep_start", slice(16)), ("keep_end", slice(-16, None))])
def test_the_task_is_read_where_training_cuts(tmp_path, mode, kept):
    whole = Job(settings(tmp_path, PAIRS, max_length=None)).features(1)[0]
    cut = Job(settings(tmp_path, PAIRS, max_length=16, truncation_mode=mode)).features(1)[0]
    assert cut == {name: values[kept] for name, values in whole.items()}


def test_rows_of_an_earlier_version_are_converted_anew(monkeypatch):
    monkeypatch.setattr(arrow_dataset, "update_fingerprint", update_fingerprint)
    table = datasets.Dataset.from_list(PAIRS)
    names = [_converted(table, [], "text")._fingerprint for _ in range(2)]
    monkeypatch.setattr(peft_safety, "__version__", "another")
    assert names[0] == names[1] != _converted(table, [], "text")._fingerprint
