"""axolotl itself: `axolotl train` and `axolotl merge-lora` with a YAML file that selects our plugin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.integrations.conftest import Run, verified

HERE = Path(__file__).resolve().parent
JOB = {
    "base_model": "base",
    "plugins": ["peft_safety.integrations.axolotl.GuardSpacePlugin"],
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_target_linear": True,
    "datasets": [{"path": "task.jsonl", "type": "chat_template", "ds_type": "json"}],
    "sequence_len": 256,
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "max_steps": 2,
    "learning_rate": 0.01,
    "optimizer": "adamw_torch",
    "bf16": False,
    "tf32": False,
    "save_strategy": "no",
    "special_tokens": {"pad_token": "<|pad|>"},
}


def job(world: Path, name: str, **keys: Any) -> str:
    (world / f"{name}.yaml").write_text(yaml.safe_dump({**JOB, "output_dir": name, **keys}), encoding="utf-8")
    return f"{name}.yaml"


def merged_by_peft(world: Path, name: str) -> dict[str, torch.Tensor]:
    base = AutoModelForCausalLM.from_pretrained(world / "base", dtype=torch.float32)
    return PeftModel.from_pretrained(base, world / name).merge_and_unload().state_dict()


def test_guardspace_is_trained_continued_and_merged(world: Path, run: Run) -> None:
    guard = {"adapter": "guardspace", "peft_safety": {"subspace": "guardspace.safetensors"}}
    run("axolotl", "-m", "axolotl.cli.train", job(world, "guard", **guard))
    facts = verified(world / "guard", world / "guardspace.safetensors")
    assert facts["blindness_checked"]
    assert facts["worst_leak"] < 1e-6
    assert facts["settings"]["a_init"] == "task", "the rows are the trainer's"

    again = job(world, "again", **guard, lora_model_dir="guard")
    run("axolotl", "-m", "axolotl.cli.train", again)
    assert verified(world / "again", world / "guardspace.safetensors")["blindness_checked"]
    first, second = (load_file(world / name / "adapter_model.safetensors") for name in ("guard", "again"))
    for name, value in second.items():
        assert value.equal(first[name]) == ("lora_A" in name), name

    run("axolotl", "-m", "axolotl.cli.merge_lora", again, "--lora_model_dir=again")
    expected = merged_by_peft(world, "again")
    for name, value in load_file(world / "again" / "merged" / "model.safetensors").items():
        torch.testing.assert_close(value.float(), expected[name], msg=name)


def test_salora_is_trained_on_four_bits_and_merged(world: Path, run: Run) -> None:
    file = job(world, "bits", adapter="salora", peft_safety={"subspace": "salora.safetensors"}, load_in_4bit=True)
    said = run("axolotl", "-m", "axolotl.cli.train", file)
    assert "prepare_model_for_kbit_training" in said  # axolotl's own preparation of a quantized base
    assert verified(world / "bits")["worst_leak"] < 1e-6

    run("axolotl", "-m", "axolotl.cli.merge_lora", file, "--lora_model_dir=bits")
    expected = merged_by_peft(world, "bits")
    for name, value in load_file(world / "bits" / "merged" / "model.safetensors").items():
        torch.testing.assert_close(value.float(), expected[name], msg=name)


@pytest.fixture
def plain(world: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(world / "base")
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(world / "plain")


@pytest.mark.usefixtures("plain")
def test_what_is_refused_and_what_a_trainer_gets(world: Path, run: Run) -> None:
    job(world, "cases", adapter="guardspace", peft_safety={"subspace": "guardspace.safetensors"})
    assert "all cases" in run("axolotl", str(HERE / "axolotl_cases.py"), "cases.yaml")
