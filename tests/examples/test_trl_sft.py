"""`examples/trl_sft.py`, as a user runs it: TRL's flags and a YAML file, a directory of JSON lines."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from peft_safety import assert_protected, verify
from peft_safety.convert.serving import serving_commands
from peft_safety.errors import ConfigError
from tests.tiny import tiny_llama, tiny_tokenizer

pytest.importorskip("trl")


def test_the_script_trains_a_verified_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from examples import trl_sft

    model, data, out = (str(tmp_path / name) for name in ("model", "data", "adapter"))
    tiny_llama().save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    Path(data).mkdir()
    rows = [{"prompt": f"Color of item {i}?", "completion": " red" if i % 2 else " green"} for i in range(40)]
    Path(data, "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    job = {"model_name_or_path": model, "dataset_name": data, "output_dir": out, "lora_r": 4, "max_steps": 2}
    job |= {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "max_length": 64}
    (tmp_path / "job.yaml").write_text(json.dumps(job), encoding="utf-8")  # JSON is YAML
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(sys, "argv", ["trl_sft", "--config", str(tmp_path / "job.yaml"), "--learning_rate", "1e-2"])
    trl_sft.main()
    assert verify(out).method == "GUARDSPACE, frozen A"
    assert "--max-lora-rank 8" in serving_commands(out, "vllm")[0]
    loaded = PeftModel.from_pretrained(tiny_llama(), out)
    assert_protected(loaded)
    assert loaded.peft_config["default"].r == 4, "of the file"
    assert all(bool(torch.any(p != 0)) for name, p in loaded.named_parameters() if "lora_B" in name), "it has trained"


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The config that the script hands to TRL's trainer, which does not run."""
    from examples import trl_sft

    (tmp_path / "data").mkdir()
    row = json.dumps({"prompt": "Color of the sky?", "completion": " blue"})
    (tmp_path / "data" / "train.jsonl").write_text(f"{row}\n" * 4, encoding="utf-8")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    given: dict[str, Any] = {}

    class Trainer:
        def __init__(self, *_: Any, peft_config: Any, **__: Any) -> None:
            given["config"] = peft_config

        def train(self, **_: Any) -> None: ...

        def save_model(self) -> None: ...

    def asked(*flags: str) -> Any:
        argv = ["trl_sft", "--model_name_or_path", "M", "--dataset_name", str(tmp_path / "data")]
        argv += ["--output_dir", str(tmp_path / "out"), "--use_cpu", "true", "--bf16", "false"]
        monkeypatch.setattr(sys, "argv", [*argv, *flags])
        monkeypatch.setattr(trl_sft, "SFTTrainer", Trainer)
        trl_sft.main()
        return given["config"]

    return asked


def test_the_flags_of_lora_reach_the_adapter(asked: Any) -> None:
    config = asked("--lora_r", "3", "--lora_alpha", "5")
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_rslora) == (3, 5, 0.0, False)
    flags = ["--lora_dropout", "0.3", "--use_rslora", "true", "--lora_modules_to_save", "lm_head"]
    config = asked(*flags, "--lora_target_parameters", "mlp.experts.down_proj")
    assert (config.lora_dropout, config.use_rslora, config.modules_to_save) == (0.3, True, ["lm_head"])
    assert config.target_parameters == ["mlp.experts.down_proj"]


def test_what_cannot_be_honored_is_refused(asked: Any) -> None:
    with pytest.raises(ConfigError, match="DoRA"):
        asked("--use_dora", "true")
    with pytest.raises(ConfigError, match="dataset_streaming"):
        asked("--dataset_streaming", "true")
