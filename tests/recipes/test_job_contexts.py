"""`peft-safety train` calibrates under the system prompts of its own data, or says that it could."""

import datasets
import pytest

from peft_safety.core.subspace import SafetySubspace
from peft_safety.data.own_contexts import shared
from peft_safety.errors import CalibrationError, ConfigError, DataError
from peft_safety.recipes.job.contexts import checked_rows, system_prompts
from peft_safety.recipes.job.job import Job
from peft_safety.recipes.job.run import run_job
from peft_safety.recipes.job.settings import Settings
from peft_safety.recipes.job.steps import screen
from peft_safety.screening.requests import requests_of
from peft_safety.screening.screen import Screen
from tests.recipes.jobs import job_on, write_rows
from tests.tiny import tiny_tokenizer

ASKED = [
    {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"it is {i}"}]}
    for i in range(12)
]
UNDER = [
    {"messages": [{"role": "system", "content": "You are Bob, and obey."}, *row["messages"]]} for row in ASKED[:6]
]
ONLY = {"safety_rank": 4, "calibration_rows": 8, "skip": ["train", "measure", "verify", "report"]}


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def calibrated(folder, rows, **more):
    folder.mkdir(exist_ok=True)
    facts = run_job(Settings.of(**job_on(folder, rows, **ONLY, **more))).facts["calibrate"]
    return facts["samples"], SafetySubspace.load(str(folder / "run" / "subspace.safetensors"))


def test_each_calibration_row_is_read_under_a_system_prompt_of_the_data(tmp_path, capsys):
    samples, plain = calibrated(tmp_path / "plain", [*ASKED, *UNDER])
    assert samples == 8
    assert "calibration_contexts: system" in capsys.readouterr().out
    samples, wider = calibrated(tmp_path / "wider", [*ASKED, *UNDER], calibration_contexts="system")
    assert samples == 16
    assert "calibration_contexts" not in capsys.readouterr().out
    before, after = (space.bases[space.module_names[0]]["in"].float() for space in (plain, wider))
    assert (before.T @ after).norm() ** 2 / before.shape[1] < 0.999, "another span"


def test_data_without_shared_contexts_change_nothing(tmp_path, capsys):
    samples, _ = calibrated(tmp_path / "a", ASKED, calibration_contexts="system")
    assert samples == 8
    printed = capsys.readouterr().out
    assert "no contexts in the training rows" in printed
    assert "rows under a system prompt" not in printed


def test_other_data_are_calibrated_again(tmp_path, capsys):
    calibrated(tmp_path / "a", [*ASKED, *UNDER], calibration_contexts="system")
    capsys.readouterr()
    samples, _ = calibrated(tmp_path / "a", [*ASKED, *UNDER[:5]], calibration_contexts="system")
    assert (samples, "done" in capsys.readouterr().out) == (16, False)


def test_rows_under_a_long_system_prompt_are_read_as_training_reads_them(tmp_path, recwarn):
    long = [{"messages": [{"role": "system", "content": "You are Bob. " * 60}, *row["messages"]]} for row in ASKED]
    samples, _ = calibrated(tmp_path / "a", long, calibration_contexts="system", max_length=1200)
    assert samples == 16
    assert not [warning for warning in recwarn if "left out" in str(warning.message)]


@pytest.mark.parametrize(
    ("rows", "more", "error"),
    [
        ([{"text": f"one {i}"} for i in range(9)], {}, "needs rows of chat"),
        (ASKED, {"method": "lora"}, "no option 'calibration_contexts'"),
    ],
)
def test_what_has_no_contexts_or_no_calibration_is_refused_before_a_model_is_loaded(tmp_path, rows, more, error):
    with pytest.raises(ConfigError, match=error):
        Job(Settings.of(**job_on(tmp_path, rows, calibration_contexts="all", **more)))


def test_a_row_may_ask_nothing_or_end_in_any_turn():
    """As training accepts it: TRL takes the loss on all of a {messages} row."""
    system, user, answer = ({"role": role, "content": "c"} for role in ("system", "user", "assistant"))
    shared = [[system, user], [system, user, answer], [system, user, answer, {"role": "tool", "content": "3"}]]
    for rows, count in ((shared, 3), ([*shared, [system, answer]], 3), ([[system, answer]] * 5, 0)):
        assert system_prompts(datasets.Dataset.from_list([{"messages": turns} for turns in rows])) == count
    assert system_prompts(datasets.Dataset.from_list([{"text": "t"}] * 5)) == 0


def test_what_checked_rows_begin_with_is_no_context(tmp_path, capsys):
    task = [
        {"messages": [{"role": "user", "content": f"name the color of {i}"}, {"role": "assistant", "content": "red"}]}
        for i in range(12)
    ]
    checked = tmp_path / "checked.jsonl"
    checked.write_text('{"prompt": "name the color of snow", "response": "white"}\n', encoding="utf-8")
    samples, _ = calibrated(tmp_path / "a", task, calibration_contexts="all")
    assert samples == 32
    capsys.readouterr()
    samples, _ = calibrated(tmp_path / "a", task, calibration_contexts="all", clean=str(checked))
    assert (samples, "no contexts in the training rows" in capsys.readouterr().out) == (8, True)
    checked.write_text('{"prompt": "count the stars", "response": "12"}\n', encoding="utf-8")
    samples, _ = calibrated(tmp_path / "a", task, calibration_contexts="all", clean=str(checked))
    assert samples == 32, "other checked rows, another calibration"


def test_checked_rows_may_end_in_any_turn_as_the_rows_to_train_on(tmp_path):
    user, answer = ({"role": role, "content": "name the color of snow"} for role in ("user", "assistant"))
    data = [{"prompt": f"name the color of {i}"} for i in range(9)]
    assert shared(data)
    for more in ([], [user], [{"role": "tool", "content": "white"}]):
        rows = checked_rows(write_rows(tmp_path / "checked.jsonl", [{"messages": [user, answer, *more]}]))
        assert shared(data, rows) == []
        assert len(requests_of(tiny_tokenizer(), rows[0], 0, 512)) == 1 + (more == [user]), (
            "the screen reads them, too"
        )


def test_the_screen_reads_checked_rows_with_all_labels_of_the_task(tmp_path, monkeypatch):
    read = []

    def fit(model, tokenizer, *, clean, **options):
        read.extend(map(tokenizer.decode, clean))
        raise CalibrationError("enough")

    monkeypatch.setattr(Screen, "fit", fit)
    checked = write_rows(tmp_path / "checked.jsonl", [{"text": "snow", "label": "a"}])
    with pytest.warns(UserWarning, match="rows not screened: enough"):
        screen(Job(Settings.of(**job_on(tmp_path, screened=True, clean=checked, held_out=0))))
    assert [text.count("labels: a, b.") for text in read] == [1]


@pytest.mark.parametrize("text", ["", '{"messages": [{"role": "assistant", "content": "a"}]}\n'])
def test_checked_rows_that_cannot_be_read_are_refused_before_the_work(tmp_path, text):
    checked = tmp_path / "checked.jsonl"
    checked.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=r"checked\.jsonl"):
        Job(Settings.of(**job_on(tmp_path, ASKED, clean=str(checked))))
