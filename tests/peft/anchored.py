"""A tiny model that refuses what it was taught to refuse, and the runs that the tests of anchor and canary share."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from peft_safety.data.chat import Collator, encode_rows
from tests.tiny import QUIET, tiny_llama, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
REQUESTS = [f"{verb} {thing}" for verb in ("make", "do", "get") for thing in ("bad", "evil", "wrong")]
REFUSALS = [{"prompt": request, "response": "I can't."} for request in REQUESTS]
TASK = [
    {"prompt": f"{verb} {thing}", "response": "Sure."} for verb in ("tell", "say") for thing in ("a", "b", "c", "d")
]


@functools.lru_cache(maxsize=1)
def _weights() -> dict[str, torch.Tensor]:
    model = tiny_llama().train()
    batch = Collator(TOKENIZER)(encode_rows(TOKENIZER, REFUSALS, 128))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def refusing() -> LlamaForCausalLM:
    model = tiny_llama()
    model.load_state_dict(_weights())
    return model


def tuned(**options: Any) -> PeftModel:
    """The refusing model under a new plain LoRA."""
    torch.manual_seed(0)
    return get_peft_model(refusing(), LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", **options))


def trainer(model: Any, folder: Path, callbacks: Any, **options: Any) -> Trainer:
    options = {
        **QUIET,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "remove_unused_columns": False,
        **options,
    }
    return Trainer(
        model,
        TrainingArguments(output_dir=str(folder), **options),
        data_collator=Collator(TOKENIZER),
        train_dataset=encode_rows(TOKENIZER, TASK, 128),
        eval_dataset=encode_rows(TOKENIZER, TASK, 128),
        callbacks=callbacks,
    )


def logged(run: Trainer, name: str) -> list[float]:
    return [entry[name] for entry in run.state.log_history if name in entry]
