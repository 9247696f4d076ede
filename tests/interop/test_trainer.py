"""The Hugging Face Trainer: checkpoints, resumption, the monitor, and what it does to the model on the way."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_safety import PeftSafetyError, SafetyMonitorCallback, assert_protected, verify
from peft_safety.errors import ProtectionError
from peft_safety.layers import protected_leaves
from tests.interop.helpers import (
    MAX_LEAK,
    assert_same,
    factors,
    largest_leak,
    protected_llama,
    random_subspace,
    token_rows,
)
from tests.tiny import QUIET, tiny_llama

STEPS = 6
CHECKPOINT = 3


def trainer(model: nn.Module, directory: Path, callbacks: Any = (), **options: Any) -> Trainer:
    options = {**QUIET, "max_steps": STEPS, "per_device_train_batch_size": 2, **options}
    arguments = TrainingArguments(output_dir=str(directory), **options)
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=token_rows(),
        eval_dataset=token_rows(4, seed=1),
        callbacks=list(callbacks),
    )


class Crash(BaseException):
    """What kills a run; no handler in the Trainer expects it."""


class CrashAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise Crash


class ReplaceLeafAt(TrainerCallback):
    """Puts an ordinary linear layer where a protected leaf was."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            layer = kwargs["model"].base_model.model.model.layers[1].mlp.up_proj
            old = layer.lora_B["default"]
            layer.lora_B["default"] = nn.Linear(old.in_features, old.out_features, bias=False)


@pytest.mark.parametrize("optimizer", ["adamw_torch", "sgd"])
def test_a_killed_run_resumes_to_the_very_bits_of_an_uninterrupted_one(tmp_path: Path, optimizer: str) -> None:
    options = {"optim": optimizer, "weight_decay": 0.1, "lr_scheduler_type": "cosine"}
    saving = {**options, "save_strategy": "steps", "save_steps": CHECKPOINT}
    whole = trainer(
        protected_llama(lora_dropout=0.1), tmp_path / "whole", **saving
    )  # saving folds: a run that does not save has other last bits
    whole.train()
    with pytest.raises(Crash):
        trainer(protected_llama(lora_dropout=0.1), tmp_path / "cut", [CrashAt(CHECKPOINT + 1)], **saving).train()
    resumed = trainer(
        protected_llama(seed=7, lora_dropout=0.1), tmp_path / "cut", **saving
    )  # other factors and another subspace: the checkpoint's count
    resumed.train(resume_from_checkpoint=True)

    assert resumed.state.global_step == STEPS
    assert_same(factors(whole.model), factors(resumed.model))
    assert largest_leak(whole.model) <= MAX_LEAK


def test_a_resumed_adapter_is_held_to_the_checkpoints_subspace_and_not_to_its_own(tmp_path: Path) -> None:
    first = trainer(
        protected_llama(seed=0), tmp_path, max_steps=CHECKPOINT, save_strategy="steps", save_steps=CHECKPOINT
    )
    first.train()
    second = trainer(protected_llama(seed=7), tmp_path)
    second.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{CHECKPOINT}"))
    bases = {name: leaf.basis for name, leaf in protected_leaves(first.model)}
    assert all(torch.equal(leaf.basis, bases[name]) for name, leaf in protected_leaves(second.model))
    assert_protected(second.model)
    assert largest_leak(second.model) <= MAX_LEAK


def test_a_trained_task_initialization_resumes_bit_exactly(tmp_path: Path) -> None:
    task = {"init": "task", "task_data": random_subspace(tiny_llama(), rank=6, seed=3)}
    saving = {"save_strategy": "steps", "save_steps": CHECKPOINT}
    whole = trainer(protected_llama(**task), tmp_path / "whole", **saving)
    whole.train()
    with pytest.raises(Crash):
        trainer(protected_llama(**task), tmp_path / "cut", [CrashAt(CHECKPOINT + 1)], **saving).train()
    resumed = trainer(protected_llama(**task), tmp_path / "cut", **saving)
    resumed.train(resume_from_checkpoint=True)
    assert_same(factors(whole.model), factors(resumed.model))
    assert largest_leak(resumed.model) <= MAX_LEAK


def test_every_checkpoint_is_a_complete_verified_adapter(tmp_path: Path) -> None:
    run = trainer(protected_llama(), tmp_path, save_strategy="steps", save_steps=CHECKPOINT)
    run.train()
    for step in (CHECKPOINT, STEPS):
        verify(tmp_path / f"checkpoint-{step}")
    loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / f"checkpoint-{STEPS}"))
    assert_same(factors(run.model), factors(loaded))


def test_save_only_model_writes_the_adapter_and_no_training_state(tmp_path: Path) -> None:
    run = trainer(protected_llama(), tmp_path, save_strategy="steps", save_steps=STEPS, save_only_model=True)
    run.train()
    directory = tmp_path / f"checkpoint-{STEPS}"
    names = {path.name for path in directory.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "safety_subspace.safetensors"} <= names
    assert not names & {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    assert not [name for name in names if name.startswith(".")]
    assert_same(factors(run.model), factors(PeftModel.from_pretrained(tiny_llama(), str(directory))))


def test_the_best_checkpoint_comes_back_at_the_end_with_its_protection(tmp_path: Path) -> None:
    every = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": CHECKPOINT, "eval_steps": CHECKPOINT}
    picked = {"load_best_model_at_end": True, "metric_for_best_model": "step_was", "greater_is_better": False}
    run = trainer(protected_llama(), tmp_path, [StepMetric()], **every, **picked)
    run.train()
    assert run.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{CHECKPOINT}")
    stored = load_file(tmp_path / f"checkpoint-{CHECKPOINT}" / "adapter_model.safetensors")
    assert_same({name.replace(".default", ""): value for name, value in factors(run.model).items()}, stored)
    assert_protected(run.model)


class StepMetric(TrainerCallback):
    """Makes the earliest evaluation the best one."""

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        metrics["eval_step_was"] = state.global_step


def test_the_monitor_records_the_leak_beside_the_loss(tmp_path: Path) -> None:
    run = trainer(protected_llama(), tmp_path, [SafetyMonitorCallback()])
    run.train()
    rows = [row for row in run.state.log_history if "loss" in row]
    assert len(rows) == STEPS
    assert all(0 <= row["safety_leak"] <= MAX_LEAK for row in rows)
    assert any(row["safety_leak"] > 0 for row in rows)


def test_the_monitor_reaches_loggers_that_stand_behind_it(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    class Logger(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            seen.append(dict(logs))

    trainer(protected_llama(), tmp_path, [SafetyMonitorCallback(), Logger()], max_steps=2).train()
    assert [row["safety_leak"] <= MAX_LEAK for row in seen if "loss" in row] == [True, True]


@pytest.mark.parametrize("when", ["save", "end"])
def test_the_monitor_stops_a_run_whose_leaf_was_replaced(tmp_path: Path, when: str) -> None:
    saving = {"save_strategy": "steps", "save_steps": CHECKPOINT + 1} if when == "save" else {}
    run = trainer(protected_llama(), tmp_path, [ReplaceLeafAt(CHECKPOINT), SafetyMonitorCallback()], **saving)
    with pytest.raises(ProtectionError, match=r"layers\.1\.mlp\.up_proj"):
        run.train()
    assert not list(tmp_path.rglob("adapter_model.safetensors"))


def test_the_monitor_refuses_to_start_on_an_unprotected_model(tmp_path: Path) -> None:
    plain = get_peft_model(tiny_llama(), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    run = trainer(plain, tmp_path, [SafetyMonitorCallback()])
    with pytest.raises(PeftSafetyError, match="no protected adapter"):
        run.train()
    assert run.state.global_step == 0


def test_a_checkpoint_of_plain_lora_is_refused_by_a_protected_run(tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer(get_peft_model(tiny_llama(), config), tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    run = trainer(protected_llama(), tmp_path)
    before = factors(run.model)
    with pytest.raises(PeftSafetyError, match="under a new name"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert_same(before, factors(run.model))


def test_gradient_accumulation_equals_the_large_batch(tmp_path: Path) -> None:
    parts = trainer(
        protected_llama(),
        tmp_path,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        optim="sgd",
        learning_rate=0.5,
    )
    parts.train()
    whole = trainer(protected_llama(), tmp_path, per_device_train_batch_size=4, optim="sgd", learning_rate=0.5)
    whole.train()
    assert_same(factors(parts.model), factors(whole.model), rtol=1e-4, atol=1e-6)
    assert largest_leak(parts.model) <= MAX_LEAK


@pytest.mark.parametrize(
    "reentrant",
    [
        False,
        pytest.param(
            True,
            marks=pytest.mark.skipif(
                transformers.__version__ < "5", reason="transformers 4 fails here with plain LoRA too"
            ),
        ),
    ],
)
def test_gradient_checkpointing_with_accumulation_changes_no_bit(tmp_path: Path, reentrant: bool) -> None:
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 3}
    without = trainer(protected_llama(lora_dropout=0.1), tmp_path, **options)
    without.train()
    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    with_it = trainer(protected_llama(lora_dropout=0.1), tmp_path, **options, **checkpointing)
    with_it.train()
    assert_same(factors(without.model), factors(with_it.model))
    assert largest_leak(with_it.model) <= MAX_LEAK


def test_a_distributed_checkpoint_restores_weights_and_optimizer_to_the_bit() -> None:
    """It initializes the optimizer by a step at rate 0, and must leave the weights that it has restored as they
    are.
    """
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_model_state_dict, set_optimizer_state_dict

    def stepped(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        ids = torch.randint(4, 200, (2, 12), generator=torch.Generator().manual_seed(seed))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def started(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = protected_llama(seed)
        return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    model, optimizer = started(0)
    for seed in range(3):
        stepped(model, optimizer, seed)
    weights, states = copy.deepcopy(get_state_dict(model, optimizer))
    saved = factors(model)
    other, its_optimizer = started(0)
    set_model_state_dict(
        other, weights
    )  # the weights first, as accelerate does it: what comes next must not touch them
    set_optimizer_state_dict(other, its_optimizer, states)
    assert_same(saved, factors(other))
    for seed in range(3, 5):
        stepped(model, optimizer, seed)
        stepped(other, its_optimizer, seed)
    assert_same(factors(model), factors(other))
    assert largest_leak(other) <= MAX_LEAK
