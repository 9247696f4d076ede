"""Settings of `peft-safety train`: a YAML file and flags mean the same; mistakes are told before loading."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import training_args
from typer.testing import CliRunner

from peft_safety.cli import app
from peft_safety.errors import ConfigError
from peft_safety.recipes.job import fields
from peft_safety.recipes.job.options import STEPS, SafetyOptions
from peft_safety.recipes.job.settings import Settings, help_text

ROOT = Path(__file__).resolve().parents[2]
PLACES = {"model_name_or_path": "no/such/model", "dataset_name": "no/such/rows"}
VALUES = {
    **PLACES,
    "load_in_4bit": True,
    "lora_r": 4,
    "lora_target_modules": ["q_proj", "v_proj"],
    "learning_rate": 1e-3,
    "max_length": None,
    "gradient_checkpointing": False,
    "lr_scheduler_type": "cosine",
    "lr_scheduler_kwargs": {"num_cycles": 1},
    "report_to": "none",
    "push_to_hub": True,
    "resume_from_checkpoint": "true",
    "safety_rank": 8,
    "safety_rank_pattern": {"q_proj": 0.5},
    "skip": ["measure", "report"],
}
FLAGS = """--model_name_or_path no/such/model --dataset-name no/such/rows --load_in_4bit --lora_r=4
--lora_target_modules q_proj v_proj --learning_rate 1e-3 --max_length none --no_gradient_checkpointing
--lr_scheduler_type cosine --lr_scheduler_kwargs {"num_cycles":1} --report_to none --push_to_hub true
--resume_from_checkpoint true --safety_rank 8 --safety_rank_pattern q_proj=0.5 --skip measure report"""


def test_the_table_holds_the_fields_of_trl():
    assert fields.table() == fields.installed(), "run python -m peft_safety.recipes.job.fields"
    assert not set(fields.table()) & set(vars(SafetyOptions())), "a name of ours hides one of TRL's"


def test_help_answers_before_trl_could_be_imported():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "peft_safety", "train", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3
    assert done.stdout.strip() == help_text()
    assert max(map(len, done.stdout.splitlines())) <= 80
    for name in (*fields.table(), *vars(SafetyOptions())):
        assert f"\n  --{name}  " in done.stdout
    assert "(default 0.0005) (TRL's: 2e-05)" in done.stdout


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("learning_rat", "learning_rate"),
        ("safety_rnk", "safety_rank"),
        ("rank", "lora_r"),
        ("model", "model_name_or_path"),
        ("data", "dataset_name"),
        ("no_lora_r", "lora_r"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(tmp_path, name, meant):
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({**PLACES, name: 1}))
    flags = [part for key, value in PLACES.items() for part in (f"--{key}", value)]
    for given in (["--config", str(tmp_path / "job.yaml")], [*flags, f"--{name}=1"], [*flags, f"--{name}", "1"]):
        with pytest.raises(ConfigError, match=f"no setting '{name}'. Did you mean '{meant}'"):
            Settings.read(given)
    refused = CliRunner().invoke(app, ["train", *flags, f"--{name}", "1"])
    assert isinstance(refused.exception, ConfigError)


def test_a_file_and_flags_mean_the_same(tmp_path):
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(VALUES))
    out = f"--output_dir={tmp_path}"
    file, flags = Settings.read([f"--config={tmp_path / 'job.yaml'}", out]), Settings.read([*FLAGS.split(), out])
    for one, other in zip(file.parts, flags.parts, strict=True):
        assert {**vars(one), "distributed_state": None} == {**vars(other), "distributed_state": None}
    assert file.given == flags.given
    assert file.model.lora_target_modules == ["q_proj", "v_proj"]
    assert (file.training.max_length, file.training.push_to_hub) == (None, True)
    assert not file.training.gradient_checkpointing
    assert file.training.lr_scheduler_kwargs == {"num_cycles": 1}
    overridden = Settings.read([f"--config={tmp_path / 'job.yaml'}", out, "--lora_r", "2", "--load_in_4bit", "no"])
    assert (overridden.model.lora_r, overridden.model.load_in_4bit) == (2, False)
    assert file.digest(VALUES) != overridden.digest(VALUES)
    assert file.digest(["learning_rate"]) == overridden.digest(["learning_rate"])


def test_the_flag_of_a_list_adds_up_and_overrides_the_file(tmp_path):
    places = [part for key, value in PLACES.items() for part in (f"--{key}", value)]
    flags = (
        "--skip screen --skip=measure --skip report verify --lora_target_modules q_proj --lora-target-modules v_proj"
    )
    flags += " --optim_target_modules a --optim_target_modules b --report_to none"
    file = {"skip": ["train"], "lora_target_modules": ["k_proj"], "report_to": "all", "safety_rank_pattern": ["a=1"]}
    read = Settings.read([*places, f"--output_dir={tmp_path}", *flags.split()], file)
    assert read.own.skip == ["screen", "measure", "report", "verify"]
    assert read.model.lora_target_modules == ["q_proj", "v_proj"]
    assert (read.training.optim_target_modules, read.training.report_to) == (["a", "b"], [])
    assert read.own.safety_rank_pattern == ["a=1"]
    assert "--skip screen" in help_text()


def test_defaults_are_those_that_the_help_names(tmp_path):
    plain = Settings.of(**PLACES, output_dir=str(tmp_path))
    assert (plain.training.learning_rate, plain.model.lora_alpha, plain.model.lora_dropout) == (5e-4, 16, 0)
    assert plain.model.lora_target_modules == "all-linear"
    assert plain.training.num_train_epochs == fields.table()["num_train_epochs"]["default"]
    assert not Settings.of(**PLACES, output_dir=str(tmp_path), use_cpu=True).training.bf16
    given = Settings.of(**PLACES, output_dir=str(tmp_path), use_cpu=True, bf16=True, lora_alpha=32)
    assert (given.training.bf16, given.model.lora_alpha) == (True, 32)


def test_without_the_accelerator_there_is_no_bf16_unless_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(training_args, "is_torch_bf16_gpu_available", lambda: True)
    places = [part for key, value in PLACES.items() for part in (f"--{key}", value)]

    def bf16(*flags, **config):
        return Settings.read([*places, "--output_dir", str(tmp_path), *flags], config).training.bf16

    assert [bf16(), bf16("--use_cpu", "false"), bf16("--use_cpu=no"), bf16(use_cpu=False)] == [True] * 4
    assert [bf16("--use_cpu"), bf16("--use_cpu", "true"), bf16(use_cpu=True)] == [False] * 3
    assert [bf16("--use_cpu", "no", use_cpu=True), bf16("--use_cpu", "--bf16=true")] == [True, True]


@pytest.mark.parametrize(
    "bad",
    [
        {"lora_r": "many"},
        {"learning_rate": [1]},
        {"load_in_4bit": True, "load_in_8bit": True},
        {"dtype": "float7"},
        {"eval_strategy": "sometimes"},
        {"dataset_name": None},
        {"env": {"A": 1}},
    ],
)
def test_values_that_cannot_be(tmp_path, bad):
    given = {**PLACES, "output_dir": str(tmp_path), **bad}
    with pytest.raises(ConfigError):
        Settings.of(**{name: value for name, value in given.items() if value is not None})


@pytest.mark.parametrize("flags", [["stray"], ["--config"], ["--config", "none.yaml"], ["-x"]])
def test_flags_that_cannot_be(flags, tmp_path):
    places = [part for key, value in PLACES.items() for part in (f"--{key}", value)]
    with pytest.raises(ConfigError):
        Settings.read([*places, "--output_dir", str(tmp_path), *flags])


def test_steps_are_in_the_help():
    assert all(step in help_text() for step in STEPS)
