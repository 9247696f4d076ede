"""TRL's trainers take a protected config where they take a LoraConfig."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from peft_safety import SafetyMonitorCallback, assert_protected, export_lora, verify
from tests.interop.helpers import MAX_LEAK, assert_same, factors, largest_leak, salora_config, token_rows
from tests.tiny import tiny_llama, tiny_tokenizer

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

OPTIONS: dict[str, Any] = {
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "gradient_checkpointing": False,
}


def completions(conversational: bool) -> Any:
    rows = [{"prompt": f"Color of item {i}?", "completion": " red" if i % 2 else " green"} for i in range(8)]
    if conversational:
        rows = [
            {
                "prompt": [{"role": "user", "content": r["prompt"]}],
                "completion": [{"role": "assistant", "content": r["completion"]}],
            }
            for r in rows
        ]
    return datasets.Dataset.from_list(rows)


def sft(directory: Path, config: Any, conversational: bool = False, **options: Any) -> Any:
    arguments = trl.SFTConfig(output_dir=str(directory), max_length=64, **(OPTIONS | options))
    return trl.SFTTrainer(
        model=tiny_llama(),
        args=arguments,
        train_dataset=completions(conversational),
        processing_class=tiny_tokenizer(),
        peft_config=config,
    )


def assert_reloads(model: torch.nn.Module, directory: Path) -> None:
    """What was saved is a verified adapter and computes what the trained model computes."""
    verify(directory)
    ids = torch.randint(4, 200, (2, 9), generator=torch.Generator().manual_seed(5))
    loaded = PeftModel.from_pretrained(tiny_llama(), str(directory)).eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    assert_protected(loaded)


@pytest.mark.parametrize("conversational", [False, True])
def test_sft_trains_saves_and_reloads_a_protected_adapter(tmp_path: Path, conversational: bool) -> None:
    run = sft(tmp_path, salora_config(), conversational)
    before = factors(run.model)
    run.add_callback(SafetyMonitorCallback())
    run.train()
    assert_protected(run.model)
    assert largest_leak(run.model) <= MAX_LEAK
    assert any(not torch.equal(value, before[name]) for name, value in factors(run.model).items())
    assert all(row["safety_leak"] <= MAX_LEAK for row in run.state.log_history)
    run.save_model(str(tmp_path / "final"))
    assert_reloads(run.model, tmp_path / "final")


def test_sft_under_protection_learns_nearly_as_much_as_plain_lora(tmp_path: Path) -> None:
    gains = {}
    for name, config in {
        "plain": LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        "protected": salora_config(),
    }.items():
        run = sft(tmp_path / name, config, max_steps=20)
        before = run.evaluate(run.train_dataset)["eval_loss"]
        run.train()
        gains[name] = before - run.evaluate(run.train_dataset)["eval_loss"]
    # 4 of 16 to 64 output directions are closed. How far a random tiny model can learn at all is plain LoRA's
    # business: it is the yardstick.
    assert gains["plain"] > 0.1
    assert gains["protected"] > 0.8 * gains["plain"]


def test_sft_resumes_from_a_checkpoint_to_the_same_bits(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}  # saving folds: a run that does not save has other last bits
    torch.manual_seed(0)
    whole = sft(tmp_path / "whole", salora_config(), **saving)
    whole.train()
    torch.manual_seed(0)
    sft(tmp_path / "cut", salora_config(), **saving).train()
    resumed = sft(tmp_path / "cut", salora_config(seed=7), **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    assert_same(factors(whole.model), factors(resumed.model))


def test_a_model_trained_by_sft_exports_to_plain_lora(tmp_path: Path) -> None:
    run = sft(tmp_path, salora_config())
    run.train()
    export_lora(run.model, tmp_path / "plain")
    ids = torch.randint(4, 200, (2, 9), generator=torch.Generator().manual_seed(5))
    plain = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "plain")).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            plain(input_ids=ids).logits, run.model.eval()(input_ids=ids).logits, rtol=0, atol=1e-5
        )
    assert type(plain.peft_config["default"]) is LoraConfig


def test_dpo_trains_a_protected_adapter_against_the_base_model_as_reference(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"Item {i}?", "chosen": " I can't help with that.", "rejected": " Sure, here it is."}
        for i in range(8)
    ]
    arguments = trl.DPOConfig(output_dir=str(tmp_path), max_length=64, **OPTIONS)
    run = trl.DPOTrainer(
        model=tiny_llama(),
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
        peft_config=salora_config(),
    )
    run.train()
    losses = [row["loss"] for row in run.state.log_history if "loss" in row]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)  # policy and reference agree at the start
    assert losses[-1] < losses[0]
    assert_protected(run.model, "default")
    assert largest_leak(run.model) <= MAX_LEAK
    run.save_model(str(tmp_path / "final"))
    assert_reloads(run.model, tmp_path / "final")


def test_dpo_of_a_loaded_residual_adapter_starts_from_that_adapter_as_reference(tmp_path: Path) -> None:
    """TRL adds "ref" from the config of "default" and copies parameters by name; the frozen factors are none."""
    task = [
        {"input_ids": torch.tensor([row["input_ids"]]), "labels": torch.tensor([row["input_ids"]])}
        for row in token_rows(4)
    ]
    model = get_peft_model(tiny_llama(), salora_config(init="task", task_data=task, task_rank=4))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for batch in task:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "start")
    rows = [
        {"prompt": f"Item {i}?", "chosen": " I can't help with that.", "rejected": " Sure, here it is."}
        for i in range(8)
    ]
    run = trl.DPOTrainer(
        model=PeftModel.from_pretrained(tiny_llama(), tmp_path / "start", is_trainable=True),
        args=trl.DPOConfig(output_dir=str(tmp_path), max_length=64, **OPTIONS),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
    )
    run.train()
    losses = [row["loss"] for row in run.state.log_history if "loss" in row]
    assert losses[0] == pytest.approx(0.6931, abs=1e-4)
    assert losses[-1] < losses[0]
    assert_protected(run.model)
