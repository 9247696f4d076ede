"""Safe LoRA at the end of training, in a config, and on the command line."""

import json

import pytest
import torch
from peft import PeftConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainingArguments
from typer.testing import CliRunner

from peft_safety import SafeLoRACallback, SafeLoRAConfig, safe_lora_dir, verify
from peft_safety.cli import app
from peft_safety.errors import (
    ConfigError,
    ProtectionError,
)
from tests.peft.repair_cells import IDS, aligned_llama, four_bit, trained
from tests.tiny import tiny_llama


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        ids = IDS[index % 2]
        return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("bits", [4, 32])
def test_a_trainer_run_ends_with_a_repaired_saved_adapter(tmp_path, bits):
    pair, hidden = tmp_path, 128  # bitsandbytes 0.50 quantizes matrices of a few thousand values wrongly on the CPU
    tiny_llama(hidden=hidden).save_pretrained(pair / "base")
    aligned_llama(hidden).save_pretrained(pair / "chat")
    base = four_bit(pair / "chat") if bits == 4 else aligned_llama(hidden)
    config = SafeLoRAConfig(
        r=4,
        target_modules=["q_proj", "up_proj"],
        task_type="CAUSAL_LM",
        unaligned=pair / "base",
        aligned=str(pair / "chat"),
        select="all",
    )
    model = get_peft_model(base, config)
    callback = SafeLoRACallback(checkpoints=True, progress=False)
    options = {
        "max_steps": 2,
        "save_steps": 1,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
    }
    trainer = Trainer(
        model, TrainingArguments(str(tmp_path / "run"), **options), train_dataset=Rows(), callbacks=[callback]
    )
    with pytest.warns(UserWarning, match="before Safe LoRA was applied"):
        trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    assert len(callback.report.selected) == 4
    assert verify(tmp_path / "out").repaired == 4
    with pytest.raises(ProtectionError, match="never applied"):
        verify(tmp_path / "run/checkpoint-2")
    early, late = (
        load_file(tmp_path / f"run/checkpoint-2/{part}adapter_model.safetensors") for part in ("safe_lora/", "")
    )
    final = load_file(tmp_path / "out/adapter_model.safetensors")
    assert all(torch.allclose(early[k], final[k], atol=1e-6) for k in final)
    assert not all(torch.equal(late[k], final[k]) for k in final)
    loaded = PeftConfig.from_pretrained(str(tmp_path / "out"))
    assert isinstance(loaded, SafeLoRAConfig)
    assert loaded.safe_lora["repaired"] == 4
    fields = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert fields["peft_type"] == "SAFELORA"


def test_the_callback_refuses_a_plain_adapter(pair, tmp_path):
    model = trained(aligned_llama())
    trainer = Trainer(
        model,
        TrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True),
        train_dataset=Rows(),
        callbacks=[SafeLoRACallback()],
    )
    with pytest.raises(ConfigError, match="SafeLoRACallback"):
        trainer.train()


@pytest.mark.parametrize(
    "options", [{}, {"unaligned": ""}, {"unaligned": "a", "select": "some"}, {"unaligned": "a", "use_dora": True}]
)
def test_a_config_that_cannot_be_honored(options):
    with pytest.raises(ConfigError):
        SafeLoRAConfig(r=4, **options)


def test_changed_factors_do_not_verify(pair, tmp_path):
    safe_lora_dir(pair / "adapter", pair / "base", out_dir=tmp_path / "out", select="all", progress=False)
    file = tmp_path / "out/adapter_model.safetensors"
    from safetensors import safe_open

    with safe_open(file, "pt") as handle:
        metadata = handle.metadata()
    tensors = {k: v + 0.1 if "lora_B" in k else v.clone() for k, v in load_file(file).items()}
    save_file(tensors, file, metadata=metadata)
    with pytest.raises(ProtectionError, match="changed since"):
        verify(tmp_path / "out")


def test_the_command(pair, tmp_path):
    arguments = ["repair", str(pair / "adapter"), "--unaligned", str(pair / "base")]
    dry = CliRunner().invoke(
        app, [*arguments, "--dry-run", "--png", str(tmp_path / "cos.png"), "--json", "--out", str(tmp_path / "out")]
    )
    assert dry.exit_code == 0, dry.output
    assert len(json.loads(dry.stdout)["modules"]) == 14
    assert (tmp_path / "cos.png").stat().st_size > 10_000
    assert not (tmp_path / "out").exists()
    options = "--select number --num-modules 3 --projection topk --safety-rank 4"
    done = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "out"), *options.split()])
    assert done.exit_code == 0, done.output
    assert "3 of 14" in done.output
    assert verify(tmp_path / "out").repaired == 3
    every = CliRunner().invoke(app, [*arguments, "--dry-run", "--all"]).stdout
    for text, label, lines in ((done.stdout, "down_proj (2)", 7 + 1), (every, "model.layers.1.mlp.down_proj", 14)):
        shown = text.split("\n\n")[0].splitlines()  # the note below ends with a path, which may be long
        assert max(map(len, shown)) <= 80
        rows = [line for line in shown if "_proj" in line or line.startswith("all (")]
        assert len(rows) == lines
        assert any(row.startswith(label) for row in rows)
    assert isinstance(CliRunner().invoke(app, arguments).exception, ConfigError)
