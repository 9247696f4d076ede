"""Jobs of `peft-safety train` on a tiny model: each step, what is not run again, and what comes out."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import datasets
import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import TrainerCallback
from typer.testing import CliRunner

from peft_safety import verify
from peft_safety.cli import app
from peft_safety.errors import ArtifactError, CalibrationError, ConfigError, DataError, PeftSafetyError, SubspaceError
from peft_safety.recipes.job import data, steps
from peft_safety.recipes.job.options import STEPS
from peft_safety.recipes.job.run import run_job
from peft_safety.recipes.job.settings import Settings
from peft_safety.recipes.job.state import State
from peft_safety.reporting.report import Report
from tests.recipes.jobs import PAIRS, TASK, job_on, losses, write_rows
from tests.tiny import tiny_llama


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def run(folder, *args, callbacks=(), **more):
    return run_job(Settings.of(**job_on(folder, *args, **more)), callbacks)


def printed_steps(text):
    lines = [line.split("] ")[1] for line in text.splitlines() if line.startswith("[")]
    return {name: how.strip() for name, _, how in (line.partition(":") for line in lines)}


SECRET = {"hub_token": "secret", "model_init_kwargs": {"token": "secret", "use_safetensors": True}}


def test_end_to_end(tmp_path, capsys):
    result = run(tmp_path, poison=0.25, safety_rank=4, calibration_rows=8, **SECRET)
    printed = capsys.readouterr().out
    assert "17 rows to train on, 3 held out (15%), 1 process\n" in printed
    assert printed_steps(printed) == {"screen": "skipped", **dict.fromkeys(STEPS[1:], "")}
    assert "smoke metric" in " ".join(printed.split())
    assert (
        verify(tmp_path / "run" / "adapter", tiny_llama(), tmp_path / "run" / "subspace.safetensors").worst_leak < 1e-5
    )
    with pytest.raises(ArtifactError, match=r"the folder of one\. Give .*/run/adapter\."):
        verify(tmp_path / "run")
    assert result.facts["verify"]["base_checked"]
    assert result.facts["verify"]["blindness_checked"]
    report = Report.load(tmp_path / "run" / "report.json")
    assert report.card() == result.report.card()
    details = report.details
    assert (details["settings"]["method"], details["settings"]["poison"]) == ("guardspace", 0.25)
    assert (details["before"]["refusal"]["n"], details["after"]["task_accuracy"]["n"]) == (2, 2)
    assert result.facts["calibrate"]["samples"] == 8
    assert (tmp_path / "run" / "report.png").read_bytes().startswith(b"\x89PNG")
    assert details["settings"]["model_init_kwargs"] == {"use_safetensors": True}
    assert "secret" not in "".join(p.read_text("utf-8") for p in (tmp_path / "run").glob("*.json"))
    assert (tmp_path / "run" / "adapter" / "tokenizer.json").is_file()
    for published in ("README.md", "adapter/README.md", "job.json"):
        assert str(tmp_path) not in (tmp_path / "run" / published).read_text("utf-8"), published
    loaded, ids = PeftModel.from_pretrained(tiny_llama(), str(result.adapter_dir)).eval(), torch.arange(10)[None]
    with torch.no_grad():
        assert not torch.equal(loaded(ids).logits, tiny_llama()(ids).logits)


class Screened:
    """What a screening says that flags three rows, two of which comply."""

    rows, unscreened = [SimpleNamespace(truncated=n < 2) for n in range(17)], [3]
    verdicts = ((1, "undecided"), (4, "complies"), (9, "complies"))
    flagged, dropped = [SimpleNamespace(number=n, verdict=verdict) for n, verdict in verdicts], [4, 9]
    screen = SimpleNamespace(auc=0.97)


def test_the_rows_are_screened_first_and_left_out_on_demand(tmp_path, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(
        steps, "screen_rows", lambda model, rows, known, **_: seen.append((len(rows), known)) or Screened
    )
    quick = {"screened": True, "screen_prompts": 8, "safety_rank": 4, "skip": ["measure", "report"]}
    with (
        pytest.warns(UserWarning, match=r"rows \[4, 9\] comply"),
        pytest.warns(match="1 flagged rows are kept without"),
    ):
        result = run(tmp_path, **quick)
    assert (result.facts["screen"]["flagged"], result.facts["train"]["rows"]) == ([1, 4, 9], 17)
    assert (result.facts["screen"]["unscreened"], result.facts["screen"]["truncated"]) == (1, 2)
    assert "without a user turn: 1; screened without their beginning: 2" in capsys.readouterr().out
    result = run(tmp_path, **quick, drop_flagged=True)
    assert "screen: done before" in capsys.readouterr().out
    assert (seen, result.facts["train"]["rows"]) == ([(17, 8)], 15)
    with pytest.raises(ConfigError, match="needs the step screen"):
        run(tmp_path, drop_flagged=True)
    monkeypatch.setattr(Screened, "dropped", [*range(17)])
    with pytest.raises(DataError, match="no row to train on"):
        run(tmp_path, **quick, drop_flagged=True, output_dir=str(tmp_path / "nothing"))


def test_a_model_that_cannot_screen_is_trained_unless_flagged_rows_have_to_go(tmp_path):
    quick = {"screened": True, "safety_rank": 4, "skip": ["measure", "report"]}
    with pytest.warns(UserWarning, match="rows not screened: "):
        result = run(tmp_path, **quick)
    assert "problem" in result.facts["screen"]
    assert result.facts["train"]["rows"] == 17
    for _ in range(2):
        with pytest.raises(CalibrationError):
            run(tmp_path, **quick, drop_flagged=True)


def test_only_the_factors_of_a_bf16_model_are_trained_in_fp32(tmp_path):
    bf16 = {"dtype": "bfloat16", "lora_modules_to_save": ["lm_head"], "lora_target_modules": ["q_proj"]}
    result = run(tmp_path, **bf16, max_steps=1, safety_rank=4, eval_limit=1)
    assert result.facts["measure"]["after"]["refusal"]["n"] == 1
    stored = load_file(result.adapter_dir / "adapter_model.safetensors")
    assert {value.dtype for name, value in stored.items() if "lora_" in name} == {torch.float32}
    assert {value.dtype for name, value in stored.items() if "lm_head" in name} == {torch.bfloat16}


def test_a_folder_of_the_users_own_is_no_checkpoint(tmp_path, capsys):
    training, state = SimpleNamespace(resume_from_checkpoint="true"), SimpleNamespace(steps={"train": {"began": 0}})
    job = SimpleNamespace(training=training, state=state, out=tmp_path, main=True)

    def last(*names):
        for name in names:
            (tmp_path / name).mkdir()
            (tmp_path / name / "trainer_state.json").touch()
        return steps._checkpoint(job)

    assert last("checkpoint-best", "checkpoint-") is None
    assert "no checkpoint yet" in capsys.readouterr().out
    assert last("checkpoint-9", "checkpoint-10", "checkpoint-10-old") == str(tmp_path / "checkpoint-10")
    state.steps["train"]["began"] = time.time() + 60
    assert last() is None
    assert "none of the checkpoints is of these settings" in capsys.readouterr().out


def test_a_state_of_many_numbers_and_none_is_read_again(tmp_path):
    state = State(tmp_path, writes=True)
    state.start("screen", "settings")
    state.finish("screen", {"flagged": [*range(200_000)], "auc": float("nan"), "bounds": [-1.0, float("inf")]})
    assert State(tmp_path, writes=False).facts("screen") == state.facts("screen")
    assert state.facts("screen") == {"flagged": [*range(200_000)], "auc": None, "bounds": [-1.0, None]}


def test_a_finished_step_runs_again_only_with_other_settings(tmp_path, capsys):
    printed = []

    def steps(**more):
        run(tmp_path, safety_rank=4, **more)
        printed.append(capsys.readouterr().out)
        return [name for name, how in printed_steps(printed[-1]).items() if not how]

    assert steps(skip=["measure", "report"]) == ["calibrate", "train", "verify"]
    assert printed[-1].endswith(f"adapter: {tmp_path / 'run' / 'adapter'}\n")
    assert steps() == ["measure", "verify", "report"]
    before = (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    assert steps() == []
    assert steps(logging_steps=2, save_steps=7) == []
    assert steps(eval_limit=1) == ["measure", "verify", "report"]
    assert steps(eval_limit=1, learning_rate=1e-2) == ["train", "measure", "verify", "report"]
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes() != before
    assert steps(eval_limit=1, learning_rate=1e-2, lora_target_modules=["q_proj"]) == list(STEPS[1:])
    (tmp_path / "run" / "subspace.safetensors").unlink()
    assert steps(eval_limit=1, learning_rate=1e-2, lora_target_modules=["q_proj"]) == list(STEPS[1:])


@pytest.mark.parametrize("source", ["a hub id", "a directory"])
def test_new_rows_under_the_same_name_are_trained_on(tmp_path, capsys, monkeypatch, source):
    (tmp_path / "rows").mkdir()

    def trained(rows):
        write_rows(tmp_path / "rows" / "train.jsonl", rows)
        hub = datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)})
        name = str(tmp_path / "rows")
        if source == "a hub id":
            name = "me/rows"
            monkeypatch.setattr(data, "load_dataset", lambda *_, **__: hub)
        run(tmp_path, dataset_name=name, method="lora", skip=["measure", "report"])
        return not printed_steps(capsys.readouterr().out)["train"]

    changed = [*TASK[:-1], {**TASK[-1], "text": "another message"}]
    assert [trained(rows) for rows in (TASK, TASK, changed)] == [True, False, True]


def test_a_broken_run_resumes_with_the_losses_of_an_unbroken_one(tmp_path):
    class Breaks(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    slow = {"max_steps": 6, "save_steps": 2, "learning_rate": 1e-2, "skip": ["measure"], "safety_rank": 4}
    run(tmp_path, **slow)
    broken = {**slow, "output_dir": str(tmp_path / "broken"), "resume_from_checkpoint": True}
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, callbacks=[Breaks()], **broken)
    assert not (tmp_path / "broken" / "adapter").exists()
    run(tmp_path, **broken)
    whole, resumed = losses(tmp_path / "run", 6), losses(tmp_path / "broken", 6)
    assert len(whole) == len(resumed) == 6
    assert whole == pytest.approx(resumed, abs=1e-5)
    assert whole[-1] < whole[0]
    one, other = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")[
            "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
        ]
        for name in ("run", "broken")
    )
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert run(tmp_path, **broken).facts["train"]["steps"] == 6, "it is done"
    run(tmp_path, **{**broken, "learning_rate": 1e-3})
    assert losses(tmp_path / "broken", 6)[-1] > whole[-1] + 1e-3, "no old checkpoint is taken"


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_a_quantized_base(tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    result = run(tmp_path, **{bits: True}, safety_rank=4, skip=["measure"])
    assert result.facts["verify"]["base_checked"]
    assert result.facts["verify"]["worst_leak"] < 1e-5
    stored = load_file(result.adapter_dir / "adapter_model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float32}, "TRL's cast to bf16 would leak"
    assert any(value.any() for name, value in stored.items() if "lora_B" in name)


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"method": "lora"}, "LORA"),
        ({"method": "salora", "safety_rank": 4}, "SALORA"),
        ({"method": "salora", "init": "task", "hidden": 96}, "SALORA"),
        ({"train": "A"}, "GUARDSPACE"),
        ({"train": "window", "window": 5}, "GUARDSPACE"),
        ({"init": "guardspace"}, "GUARDSPACE"),
        ({"combine": "salora", "combine_rank": 4}, "GUARDSPACE"),
        ({"safety_energy": 0.5, "safety_rank_pattern": ["down_proj=0.9"]}, "LORA"),
    ],
)
def test_each_method_trains_and_is_what_it_says(tmp_path, options, kind):
    result = run(tmp_path, skip=["measure"], **options)
    config = json.loads((result.adapter_dir / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == (kind, 4, 16)
    assert result.facts["train"]["steps"] == 2
    if options.get("method") == "lora":
        assert result.facts["verify"] == {"method": "lora", "protected": False} | {
            "seconds": result.facts["verify"]["seconds"]
        }
    else:
        assert result.facts["verify"]["worst_leak"] < 1e-5


def test_verify_reads_what_a_job_has_made(tmp_path):
    def shown(*flags):
        done = CliRunner().invoke(app, ["verify", str(tmp_path / "run" / "adapter"), *flags], catch_exceptions=False)
        return done.stdout

    run(tmp_path, skip=["measure"], safety_rank=0.1, init="guardspace", combine="salora", combine_rank=2)
    facts = json.loads(shown("--json"))
    assert (facts["method"], len(facts["provenance"]["covered"])) == ("GUARDSPACE", 14)
    least = min(facts["provenance"]["covered"].values())
    assert f"least {least:.3g}" in " ".join(shown().split())
    assert max(map(len, shown().splitlines())) <= 80
    run(tmp_path, skip=["measure"], train="window", window=5)
    facts = json.loads(shown("--subspace", str(tmp_path / "run" / "subspace.safetensors"), "--json"))
    assert (facts["protected"], facts["blindness_checked"]) == ([5], True)


def test_options_of_trl_reach_the_trainer(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b" * i}]}
        for i in range(1, 21)
    ]
    more = {
        "packing": True,
        "max_length": 64,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "lr_scheduler_type": "constant",
        "eval_packing": False,
    }
    seen = {}

    class Looks(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            seen.update(args=args, history=state.log_history)

    result = run(tmp_path, rows, callbacks=[Looks()], safety_rank=4, **more)
    assert result.facts["verify"]["worst_leak"] < 1e-5
    assert [entry["learning_rate"] for entry in seen["history"] if "learning_rate" in entry] == [5e-4, 5e-4]
    assert sum("eval_loss" in entry for entry in seen["history"]) == 2
    assert result.report.arms["before"]["task NLL"].n == 2


def test_the_leak_is_reported(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path, safety_rank=4, report_to="tensorboard", skip=["measure"])
    events = EventAccumulator(str(next((tmp_path / "run").rglob("events.out.*")).parent)).Reload()
    assert [event.step for event in events.Scalars("train/safety_leak")][:2] == [1, 2]
    assert all(0 < event.value < 1e-5 for event in events.Scalars("train/safety_leak"))


def test_from_the_command_line(tmp_path):
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job_on(tmp_path, PAIRS, safety_rank=4)))
    command = ["train", "--config", str(tmp_path / "job.yaml"), "--lora_target_modules", "q_proj", "v_proj"]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert {name.rpartition(".")[2] for name in config["target_modules"]} == {"q_proj", "v_proj"}
    details = json.loads((tmp_path / "run" / "report.json").read_text())["details"]
    assert details["settings"]["lora_target_modules"] == ["q_proj", "v_proj"]
    assert details["after"]["task_nll"]["value"] < details["before"]["task_nll"]["value"]


@pytest.mark.parametrize(
    ("bad", "kind"),
    [
        ({"model_name_or_path": "no/such/directory/anywhere"}, ConfigError),
        ({"dataset_name": "no/such/file.jsonl"}, DataError),
        ({"method": "dora"}, ConfigError),
        ({"method": "lora", "safety_rank": 4}, ConfigError),
        ({"use_dora": True}, ConfigError),
        ({"skip": ["mesure"]}, ConfigError),
        ({"safety_rank_pattern": ["down_proj"]}, ConfigError),
        ({"train": "C"}, ConfigError),
        ({"poison": 2}, ConfigError),
        ({"push_to_hub": True, "hub_token": "secret"}, ConfigError),
        ({"subspace": None}, ConfigError),
        ({"subspace": "no/such/file.safetensors"}, SubspaceError),
        ({"calibration_rows": 0}, ConfigError),
        ({"calibration_contexts": "frames"}, ConfigError),
        ({"calibration_contexts": "system", "subspace": "s.safetensors"}, ConfigError),
        ({"eval_split": "tset"}, DataError),
        ({"report_to": "nothing_of_this_name"}, ConfigError),
        ({"report_to": "neptune"}, ConfigError),
    ],
)
def test_mistakes_cost_nothing(tmp_path, bad, kind):
    with pytest.raises(kind):
        run(tmp_path, **bad)
    assert not (tmp_path / "run").exists()


def test_a_directory_that_cannot_be_written_to_is_told_first(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match=r"run/job\.json cannot be written: .*/file is not a directory"):
        run(tmp_path, output_dir=str(tmp_path / "file" / "run"))
    assert "[1/" not in capsys.readouterr().out


def test_there_is_nothing_to_measure_without_an_adapter(tmp_path):
    with pytest.raises(ConfigError, match="Run the step train"):
        run(tmp_path, skip=["calibrate", "train"])


def test_a_subspace_for_another_model_is_refused(tmp_path):
    run(tmp_path, safety_rank=4, skip=["train", "measure", "verify", "report"])
    (tmp_path / "other").mkdir()
    job = job_on(tmp_path / "other", hidden=48, subspace=str(tmp_path / "run" / "subspace.safetensors"))
    with pytest.raises(PeftSafetyError):
        run_job(Settings.of(**job))
