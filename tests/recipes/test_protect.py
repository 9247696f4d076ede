from __future__ import annotations

import inspect
import json

import pytest
import torch
import typer
from peft import LoraConfig, PeftModel
from typer.testing import CliRunner

from peft_safety.cli import app
from peft_safety.data import load
from peft_safety.errors import ConfigError, DataError
from peft_safety.recipes.adapter import adapter_config, calibrated
from peft_safety.recipes.calibrate import CalibrationOptions
from peft_safety.recipes.load import load_model, poisoned, task_data
from peft_safety.recipes.patch import PatchOptions
from peft_safety.recipes.protect import protect
from peft_safety.recipes.train import LEARNING_RATE, TrainOptions, finetune
from peft_safety.reporting.report import Report
from tests.tiny import tiny_llama, tiny_tokenizer

QUICK = TrainOptions(max_steps=2, batch_size=2, max_length=256, progress=False)
TASK = [{"text": f"message {index}", "label": "ab"[index % 2]} for index in range(20)]


def test_end_to_end_on_a_classification_task(tmp_path, capsys):
    config = adapter_config("lora")
    result = protect(
        tiny_llama(), TASK, tmp_path, config, tokenizer=tiny_tokenizer(), poison=0.25, options=QUICK, eval_limit=3
    )
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["details"]["before"]["refusal"]["n"] == 3
    assert saved["details"]["after"]["task_accuracy"]["n"] == 3
    assert saved["details"]["poison"] == 0.25
    assert Report.load(tmp_path / "report.json").card() == result.report.card()
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "before" in printed
    assert "smoke metric" in " ".join(printed.split())
    assert result.training.steps == 2

    again = PeftModel.from_pretrained(tiny_llama(), result.adapter_dir).eval()
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, result.model.eval()(ids).logits)
        assert not torch.equal(again(ids).logits, tiny_llama()(ids).logits)


def test_chat_data_is_scored_by_its_likelihood(tmp_path):
    rows = [{"prompt": f"say {index}", "response": f"it is {index}"} for index in range(10)]
    config = adapter_config("lora")
    result = protect(tiny_llama(), rows, tmp_path, config, tokenizer=tiny_tokenizer(), options=QUICK, eval_limit=2)
    assert result.after.task_accuracy is None
    assert result.after.task_nll is not None
    assert result.after.task_nll.value < result.before.task_nll.value


def test_salora_end_to_end(tmp_path):
    config = adapter_config("salora", safety_rank=4)
    result = protect(tiny_llama(), TASK, tmp_path, config, tokenizer=tiny_tokenizer(), options=QUICK, eval_limit=2)
    assert config.subspace == "auto", "the caller's config stays as it was"
    assert result.training.steps == 2
    assert (tmp_path / "adapter" / "safety_subspace.safetensors").is_file()


@pytest.mark.parametrize(
    "bad", [{"poison": -0.5}, {"poison": 1.5}, {"data": []}, {"model": "no/such/directory/anywhere"}]
)
def test_mistakes_cost_nothing(tmp_path, bad):
    arguments = {
        "model": tiny_llama(),
        "data": TASK,
        "config": adapter_config("lora"),
        "tokenizer": tiny_tokenizer(),
        "options": QUICK,
        **bad,
    }
    with pytest.raises((ConfigError, DataError)):
        protect(out_dir=tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


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
    for name, function in (("protect", adapter_config), ("calibrate", CalibrationOptions)):
        there = inspect.signature(function).parameters
        assert options_of(name)["--method"].default == there["method"].default == "guardspace"
    for option, name in (("--rank", "r"), ("--lora-alpha", "lora_alpha"), ("--target-modules", "target_modules")):
        assert options_of("protect")[option].default == inspect.signature(adapter_config).parameters[name].default
    assert options_of("protect")["--lr"].default == TrainOptions().lr == LEARNING_RATE
    assert options_of("patch")["--lr"].default == PatchOptions().training.lr


def test_an_option_means_one_thing_in_all_commands():
    commands = {name: options_of(name) for name in typer.main.get_command(app).commands}
    assert {name for name, options in commands.items() if "--task-data" in options} == {"calibrate"}
    assert {name for name, options in commands.items() if "--task" in options} == {"fuse"}
    lora = [options["--rank"] for options in commands.values() if "--rank" in options]
    assert len(lora) == 2
    assert all("LoRA rank" in option.help for option in lora)
    for name in ("calibrate", "protect", "patch", "repair"):
        assert {"--safety-rank", "--safety-energy"} <= set(commands[name])
        assert ("--safety-rank-pattern" in commands[name]) == (name != "repair")
    gone = {"--r", "--k", "--energy", "--fraction", "--per-kind"}
    assert not any(gone & set(options) for name, options in commands.items() if name != "audit")


def test_the_command_passes_its_options_on(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "task.jsonl").write_text("\n".join(map(json.dumps, TASK)))
    command = ["protect", "--model", str(tmp_path / "model"), "--data", str(tmp_path / "task.jsonl")]
    command += ["--out", str(tmp_path / "run"), "--safety-rank", "4"]
    options = "--method salora --rank 2 --target-modules q_proj,v_proj --max-steps 1 --batch-size 3 --eval-limit 1"
    done = CliRunner().invoke(app, [*command, *options.split()], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["safety_rank"]) == ("SALORA", 2, 4)
    assert {name.rpartition(".")[2] for name in config["target_modules"]} == {"q_proj", "v_proj"}
    details = json.loads((tmp_path / "run" / "report.json").read_text())["details"]
    assert (details["method"], details["batch_size"], details["training"]["steps"]) == ("salora", 3, 1)
    refused = CliRunner().invoke(app, [*command, "--method", "lora"])
    assert isinstance(refused.exception, ConfigError)
    assert "no option 'safety_rank'" in str(refused.exception)


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
    config = calibrated(config, model, tiny_tokenizer(), TASK, progress=False)
    assert {config.subspace.rank(name, side) for name in config.subspace.module_names} == {directions}
    assert config.safety_rank == size.get("safety_rank"), "what was asked for"


def test_safety_energy_and_a_pattern_reach_the_subspace():
    config = adapter_config(
        safety_energy=0.5, safety_rank_pattern={"down_proj": 0.9}, target_modules=["q_proj", "down_proj"]
    )
    config = calibrated(config, tiny_llama(), tiny_tokenizer(), TASK, progress=False)
    assert (config.safety_rank, config.safety_energy) == (None, 0.5)
    assert config.safety_rank_pattern == {"down_proj": 0.9}
    assert config.subspace.provenance["energy"] == 0.5
