"""TRL's preference and reward trainers with protected configs: what they save is verified and blind, and the adapter
"ref", which they copy from a loaded one, is the reference that they mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaForSequenceClassification

from peft_safety import GuardSpaceConfig, SafetySubspace, assert_protected, verify
from peft_safety.core.plain_lora import ADAPTER_FILE, PREFIX
from peft_safety.core.projection import delta_leak
from tests.interop.helpers import MAX_LEAK, token_rows
from tests.peft.cells import covering
from tests.tiny import QUIET, tiny_llama, tiny_tokenizer

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

KINDS: dict[str, dict[str, Any]] = {
    "frozen": {"train": "B", "a_init": "random"},
    "projected": {"train": "A"},
    "residual": {"train": "A", "init": "guardspace"},
    "window": {"train": "window", "window": 8, "a_init": "random"},
}
TRAINERS = ("dpo", "kto", "grpo")
OPTIONS: dict[str, Any] = {
    **QUIET,
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "bf16": False,
}
NO, YES = " I can't help with that.", " Sure, here it is."


def batches(seed: int) -> list[dict[str, Tensor]]:
    return [
        {"input_ids": torch.tensor([row["input_ids"]]), "labels": torch.tensor([row["input_ids"]])}
        for row in token_rows(4, seed=seed)
    ]


def subspace(model: nn.Module) -> SafetySubspace:
    return SafetySubspace.from_activations(
        model, batches(1), method="guardspace", rank=8, target_modules="all-linear", allow_fewer=True, progress=False
    )


def config(kind: str, space: SafetySubspace, task_type: str = "CAUSAL_LM") -> GuardSpaceConfig:
    data = {"init_data": batches(1)} if kind == "residual" else {}
    common = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "task_type": task_type}
    return GuardSpaceConfig(**common, subspace=space, **KINDS[kind], **data)


def rows(*columns: str) -> Any:
    values: dict[str, Callable[[int], Any]] = {
        "prompt": lambda i: f"Item {i}?",
        "chosen": lambda _: NO,
        "rejected": lambda _: YES,
        "completion": lambda i: YES if i % 2 else NO,
        "label": lambda i: i % 2 == 0,
    }
    return datasets.Dataset.from_list([{name: values[name](i) for name in columns} for i in range(8)])


def letters(completions: list[str], **_: Any) -> list[float]:
    """A reward that differs from completion to completion."""
    return [float(sum(map(ord, text)) % 97) for text in completions]


def trainer(kind: str, folder: Path, model: nn.Module, **options: Any) -> Any:
    common = {"model": model, "processing_class": tiny_tokenizer(), **options}
    output = {"output_dir": str(folder), **OPTIONS}
    if kind == "dpo":
        arguments = trl.DPOConfig(**output, max_length=64)
        return trl.DPOTrainer(args=arguments, train_dataset=rows("prompt", "chosen", "rejected"), **common)
    if kind == "kto":
        arguments = trl.KTOConfig(**output, max_length=64)
        return trl.KTOTrainer(args=arguments, train_dataset=rows("prompt", "completion", "label"), **common)
    if kind == "reward":
        arguments = trl.RewardConfig(**output, max_length=64)
        return trl.RewardTrainer(args=arguments, train_dataset=rows("chosen", "rejected"), **common)
    arguments = trl.GRPOConfig(**output, num_generations=2, max_completion_length=6, beta=0.1)
    return trl.GRPOTrainer(args=arguments, train_dataset=rows("prompt"), reward_funcs=letters, **common)


def worst_stored(folder: Path, space: SafetySubspace) -> float:
    """The largest share of a stored update on the protected inputs. Every update has moved."""
    tensors = load_file(folder / ADAPTER_FILE)
    shares = []
    for name, sides in space.bases.items():
        initial = f"{PREFIX}{name}.lora_B.initial" in tensors
        pairs = [[tensors[f"{PREFIX}{name}.lora_{x}.{k}"] for x in "AB"] for k in ("weight", "initial")[: 1 + initial]]
        a = torch.cat([a for a, _ in pairs])
        b = torch.cat([pairs[0][1], *(-b for _, b in pairs[1:])], dim=1)
        assert (b @ a).any(), f"{name}: an untrained factor leaks nothing"
        shares.append(delta_leak(sides["in"], a, b, "in"))
    return max(shares)


def assert_saved(run: Any, folder: Path, space: SafetySubspace) -> None:
    assert_protected(run.model)
    run.save_model(str(folder))
    by_itself = "in" in run.model.peft_config["default"].sides
    found = verify(folder, subspace=None if by_itself else space)
    assert found.blindness_checked
    assert found.worst_leak <= MAX_LEAK
    assert found.rounded_to is None
    assert worst_stored(folder, space) <= MAX_LEAK


@pytest.mark.parametrize(
    ("kind", "adapter"),
    covering(
        product(TRAINERS, KINDS), [("dpo", "window"), ("kto", "frozen"), ("kto", "residual"), ("grpo", "projected")]
    ),
)
def test_a_new_adapter_trains_and_what_is_saved_is_blind(tmp_path: Path, kind: str, adapter: str) -> None:
    space = subspace(tiny_llama())
    run = trainer(kind, tmp_path, tiny_llama(), peft_config=config(adapter, space))
    run.train()
    assert_saved(run, tmp_path / "final", space)
    ids = batches(7)[0]["input_ids"]
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "final").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, run.model.eval()(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*no projection constrains")
@pytest.mark.parametrize("adapter", ["frozen", "projected", "residual"])
def test_a_reward_model_trains_its_head_beside_a_protected_adapter(tmp_path: Path, adapter: str) -> None:
    def base() -> nn.Module:
        settings = tiny_llama().config
        settings.num_labels = 1
        torch.manual_seed(0)
        return LlamaForSequenceClassification(settings).eval()

    space = subspace(tiny_llama())
    run = trainer("reward", tmp_path, base(), peft_config=config(adapter, space, "SEQ_CLS"))
    run.train()
    assert_saved(run, tmp_path / "final", space)
    assert any("score" in key for key in load_file(tmp_path / "final" / ADAPTER_FILE))


@pytest.mark.parametrize(
    ("kind", "adapter"),
    covering(
        product(TRAINERS, KINDS), [("dpo", "frozen"), ("dpo", "residual"), ("kto", "projected"), ("grpo", "window")]
    ),
)
def test_the_reference_of_a_loaded_adapter_is_that_adapter_and_stays_it(
    tmp_path: Path, kind: str, adapter: str
) -> None:
    space, ids = subspace(tiny_llama()), batches(7)[0]["input_ids"]
    model = get_peft_model(tiny_llama(), config(adapter, space))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for batch in batches(2):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "start")
    run = trainer(kind, tmp_path, PeftModel.from_pretrained(tiny_llama(), tmp_path / "start", is_trainable=True))

    @torch.no_grad()
    def answers(name: str) -> Tensor:
        active = run.model.active_adapter
        run.model.set_adapter(name)
        logits = run.model.eval()(ids).logits
        run.model.set_adapter(active)
        return logits.log_softmax(-1)

    with torch.no_grad():
        start, bare = model.eval()(ids).logits.log_softmax(-1), tiny_llama()(ids).logits.log_softmax(-1)
    torch.testing.assert_close(answers("ref"), start, rtol=0, atol=1e-5)
    torch.testing.assert_close(answers("default"), start, rtol=0, atol=1e-5)
    assert (start - bare).abs().max() > 1e-2, "the loaded adapter is another function than the model"
    run.train()
    torch.testing.assert_close(answers("ref"), start, rtol=0, atol=1e-5)
    assert (answers("default") - start).abs().max() > 1e-3
    first = run.state.log_history[0]
    name, value = {"dpo": ("loss", math.log(2)), "kto": ("loss", 0.5), "grpo": ("kl", 0.0)}[kind]
    assert first[name] == pytest.approx(value, abs=1e-3)  # policy and reference agree at the first step
    assert_saved(run, tmp_path / "final", space)
    assert verify(tmp_path / "final" / "ref").worst_leak <= MAX_LEAK
