"""Anchor and canary in TRL's SFTTrainer, with gradient checkpointing and bf16 as it has them by default."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from peft_safety import CanaryCallback, SafetyAnchorCallback
from tests.peft.anchored import REFUSALS, REQUESTS, TASK, TOKENIZER, logged, refusing

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")


def sft(folder: Path, callbacks: list[Any], **options: Any) -> Any:
    roles = {"prompt": ("prompt", "user"), "completion": ("response", "assistant")}
    rows = [{column: [{"role": role, "content": row[name]}] for column, (name, role) in roles.items()} for row in TASK]
    arguments = trl.SFTConfig(
        output_dir=str(folder),
        max_steps=20,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        gradient_checkpointing=True,
        **options,
    )
    torch.manual_seed(0)
    return trl.SFTTrainer(
        model=refusing(),
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=TOKENIZER,
        peft_config=LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=callbacks,
    )


@pytest.mark.parametrize("bf16", [True, False])
def test_the_anchor_holds_what_the_canary_sees_go_without_it(bf16: bool, tmp_path: Path) -> None:
    looks = {}
    for name, callbacks in {"without": [], "with": [SafetyAnchorCallback(TOKENIZER, REFUSALS)]}.items():
        canary = CanaryCallback(TOKENIZER, REQUESTS, {"bare": "{}"}, every=10)
        run = sft(tmp_path / name, [*callbacks, canary], bf16=bf16)
        run.train()
        looks[name] = canary.looks
        assert len(logged(run, "safety_anchor")) == (20 if callbacks else 0)
        assert logged(run, "canary_refusal_bare") == [look["bare"] for look in canary.looks.values()]
    assert looks["without"][20]["bare"] < 0.5
    assert looks["with"][20]["bare"] > 0.8
