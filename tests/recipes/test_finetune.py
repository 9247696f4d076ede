from __future__ import annotations

import inspect

import pytest
import torch
import typer
from peft import LoraConfig

from peft_safety.cli import app
from peft_safety.data import load
from peft_safety.errors import ConfigError, DataError
from peft_safety.methods.base import calibrate
from peft_safety.recipes.adapter import adapter_config
from peft_safety.recipes.calibrate import CalibrationOptions
from peft_safety.recipes.job.options import OUR_DEFAULTS, SafetyOptions
from peft_safety.recipes.load import load_model, poisoned, task_data
from peft_safety.recipes.patch import PatchOptions
from peft_safety.recipes.train import LEARNING_RATE, TrainOptions, finetune
from tests.tiny import tiny_llama, tiny_tokenizer

QUICK = TrainOptions(max_steps=2, batch_size=2, max_length=256, progress=False)
TASK = [{"text": f"message {index}", "label": "ab"[index % 2]} for index in range(20)]


def test_the_seed_decides_everything():
    def train(seed):
        model, run = finetune(
            tiny_llama(),
            tiny_tokenizer(),
            TASK,
            LoraConfig(target_modules=["q_proj"]),
            TrainOptions(max_steps=2, seed=seed, progress=False),
        )
        return [parameter.detach().clone() for parameter in model.parameters() if parameter.requires_grad], run

    (first, run), (second, _), (other, _) = train(0), train(0), train(1)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert run.rows == len(TASK)
    assert run.trainable_parameters == sum(parameter.numel() for parameter in first)


def test_an_adapter_that_is_there_is_trained_on():
    model, _ = finetune(tiny_llama(), tiny_tokenizer(), TASK, LoraConfig(target_modules=["q_proj"]), QUICK)
    before = {
        name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    again, _ = finetune(model, tiny_tokenizer(), TASK, None, QUICK)
    assert again is model
    assert any(
        not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters() if name in before
    )
    with pytest.raises(ConfigError, match="is_trainable"):
        finetune(tiny_llama(), tiny_tokenizer(), TASK, None, QUICK)


@pytest.mark.parametrize("name", ["lr", "batch_size", "max_length", "epochs"])
def test_options_that_cannot_train(name):
    with pytest.raises(ConfigError, match=name):
        TrainOptions(**{name: 0})


def test_poison_replaces_rows_and_stays_in_the_training_split():
    harmful = {row["prompt"] for row in load("harmful_requests", "train")}
    mixed = poisoned(TASK, 0.25, seed=1)
    assert mixed == poisoned(TASK, 0.25, seed=1)
    assert len(mixed) == len(TASK)
    assert sum(row.get("prompt") in harmful for row in mixed) == 5
    assert poisoned(TASK, 0.0) == TASK
    assert not any("text" in row for row in poisoned(TASK, 1.0))


def test_task_splits(tmp_path):
    named = task_data(
        [
            {**row, "split": ("train", "test", "validation", "calibration")[index % 4]}
            for index, row in enumerate(TASK)
        ],
        "test",
        3,
    )
    assert len(named.train) == 5
    assert len(named.held_out) == 3
    assert named.labels == ["a", "b"]
    drawn = task_data(TASK)
    assert len(drawn.train) + len(drawn.held_out) == len(TASK)
    assert not {row["text"] for row in drawn.train} & {row["text"] for row in drawn.held_out}
    with pytest.raises(DataError, match="Name it in all or none"):
        task_data([*TASK, {**TASK[0], "split": "train"}])
    with pytest.raises(DataError, match="at least one of each"):
        task_data([{**TASK[0], "split": "train"}])


def test_a_loaded_model_without_a_tokenizer_in_reach():
    with pytest.raises(ConfigError, match="tokenizer="):
        load_model(tiny_llama())


def test_method_names_are_checked_first():
    with pytest.raises(ConfigError, match="'lora', 'salora' or 'guardspace'"):
        adapter_config("dora")


def options_of(command):
    return {
        option: parameter
        for parameter in typer.main.get_command(app).commands[command].params
        for option in parameter.opts
    }


def test_commands_and_functions_have_the_same_defaults():
    there = inspect.signature(CalibrationOptions).parameters
    assert options_of("calibrate")["--method"].default == there["method"].default == SafetyOptions().method
    there = inspect.signature(adapter_config).parameters
    assert there["lora_alpha"].default == OUR_DEFAULTS["lora_alpha"]
    assert [there["target_modules"].default] == OUR_DEFAULTS["lora_target_modules"]
    assert OUR_DEFAULTS["learning_rate"] == TrainOptions().lr == LEARNING_RATE
    assert options_of("patch")["--lr"].default == PatchOptions().training.lr


def test_an_option_means_one_thing_in_all_commands():
    commands = {name: options_of(name) for name in typer.main.get_command(app).commands}
    assert {name for name, options in commands.items() if "--task-data" in options} == {"calibrate"}
    assert {name for name, options in commands.items() if "--task" in options} == {"fuse"}
    lora = [options["--rank"] for options in commands.values() if "--rank" in options]
    assert len(lora) == 1
    assert all("LoRA rank" in option.help for option in lora)
    for name in ("calibrate", "patch", "repair"):
        assert {"--safety-rank", "--safety-energy"} <= set(commands[name])
        assert ("--safety-rank-pattern" in commands[name]) == (name != "repair")
    gone = {"--r", "--k", "--energy", "--fraction", "--per-kind"}
    assert not any(gone & set(options) for name, options in commands.items() if name != "audit")


@pytest.mark.parametrize(
    ("method", "size", "directions"),
    [
        ("salora", {}, 32),
        ("salora", {"safety_rank": 0.25}, 8),
        ("guardspace", {}, 8),
        ("guardspace", {"safety_rank": 5}, 5),
    ],
)
def test_a_size_is_a_number_of_directions_or_a_share_for_every_method(method, size, directions):
    model, side = tiny_llama(hidden=48 if directions == 32 else 32), "out" if method == "salora" else "in"
    config = adapter_config(method, target_modules=["q_proj"], **size)
    subspace = calibrate(model, config, tokenizer=tiny_tokenizer(), progress=False)
    assert {subspace.rank(name, side) for name in subspace.module_names} == {directions}
    assert config.safety_rank == size.get("safety_rank"), "what was asked for"


def test_safety_energy_and_a_pattern_reach_the_subspace():
    config = adapter_config(
        safety_energy=0.5, safety_rank_pattern={"down_proj": 0.9}, target_modules=["q_proj", "down_proj"]
    )
    subspace = calibrate(tiny_llama(), config, tokenizer=tiny_tokenizer(), progress=False)
    assert (config.safety_rank, config.safety_energy) == (None, 0.5)
    assert config.safety_rank_pattern == {"down_proj": 0.9}
    assert subspace.provenance["energy"] == 0.5
