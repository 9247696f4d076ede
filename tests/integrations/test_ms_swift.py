"""ms-swift itself: `swift sft` with a plugin file that selects our config."""

from __future__ import annotations

from pathlib import Path

from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.integrations.conftest import Run, verified

PLUGIN = """
from peft_safety.integrations.ms_swift import register

register("guardspace", subspace="guardspace.safetensors", task_data="task.jsonl")
register("salora", subspace="salora.safetensors")
"""
ARGUMENTS = (
    "--model base --model_type llama --template chatml --torch_dtype float32 --dataset task.jsonl "
    "--external_plugins plugin.py --lora_rank 4 --lora_alpha 8 --lora_dropout 0 --target_modules all-linear "
    "--max_steps 2 --save_steps 2 --per_device_train_batch_size 2 --gradient_accumulation_steps 1 "
    "--learning_rate 1e-2 --report_to none --add_version false --dataset_num_proc 1 --dataloader_num_workers 0"
)


def train(world: Path, run: Run, name: str, *arguments: str, code: int = 0) -> str:
    (world / "plugin.py").write_text(PLUGIN, encoding="utf-8")
    module = ("-m", "swift.cli.sft", *ARGUMENTS.split(), "--output_dir", name)
    return run("ms-swift", *module, *arguments, code=code)


def test_guardspace_is_trained_and_continued(world: Path, run: Run) -> None:
    train(world, run, "guard_swift", "--tuner_type", "guardspace")
    saved = world / "guard_swift" / "checkpoint-2"
    facts = verified(saved, world / "guardspace.safetensors")
    assert facts["blindness_checked"]
    assert facts["worst_leak"] < 1e-6

    train(world, run, "again_swift", "--tuner_type", "guardspace", "--adapters", str(saved))
    again = world / "again_swift" / "checkpoint-2"
    assert verified(again, world / "guardspace.safetensors")["blindness_checked"]
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (saved, again))
    for name, value in second.items():
        assert value.equal(first[name]) == ("lora_A" in name), name


def test_salora_is_trained(world: Path, run: Run) -> None:
    train(world, run, "salora_swift", "--tuner_type", "salora")
    assert verified(world / "salora_swift" / "checkpoint-2")["worst_leak"] < 1e-6


def test_an_ordinary_adapter_is_refused(world: Path, run: Run) -> None:
    model = AutoModelForCausalLM.from_pretrained(world / "base")
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(world / "ordinary")
    options = ("--tuner_type", "guardspace", "--adapters", "ordinary", "--load_args", "false")
    assert "ProtectionError" in train(world, run, "refused", *options, code=1)
