"""`export_lora`: a plain LoRA that any PEFT computes the same function from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from peft_safety import export_lora
from peft_safety.convert.export import export_directory
from peft_safety.errors import ConfigError, ProtectionError
from tests.peft import cells

LEAK = 1e-6


@pytest.mark.parametrize(("base", "init"), [(base, init) for base in cells.BASES for init in cells.INITS])
def test_an_exported_adapter_is_plain_lora_of_the_same_function(base: str, init: str, tmp_path: Path) -> None:
    model = cells.protected(base, init, trained=True)
    export_lora(model, tmp_path)
    loaded = PeftModel.from_pretrained(cells.base_model(base), tmp_path)
    config = loaded.peft_config["default"]
    assert type(config) is LoraConfig
    assert config.r == config.lora_alpha == (4 if init == "lora" else 8)
    # an int8 base rounds its inputs: one rounding that falls the other way is visible
    torch.testing.assert_close(
        cells.logits(loaded), cells.logits(model), rtol=1e-5, atol=5e-3 if base == "int8" else 1e-5
    )
    for name, delta in cells.deltas(model).items():
        torch.testing.assert_close(cells.deltas(loaded)[name], delta, rtol=1e-5, atol=1e-6)
    assert cells.leak(loaded, subspace=model.peft_config["default"].subspace) <= LEAK
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }


OPTIONS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True, "lora_alpha": 7},
    "patterns": {"rank_pattern": {"q_proj": 2, "down_proj": 6}, "alpha_pattern": {"v_proj": 32}},
    "regular expression": {"target_modules": r".*\.(q|o)_proj"},
}


@pytest.mark.parametrize("init", cells.INITS)
@pytest.mark.parametrize("options", OPTIONS)
def test_scales_and_patterns_are_folded_into_the_factors(options: str, init: str, tmp_path: Path) -> None:
    model = cells.protected("linear", init, trained=True, **OPTIONS[options])
    export_lora(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert not config["use_rslora"]
    assert sorted(config["target_modules"]) == sorted(name for name, _ in cells.layers_of(model))
    ranks = {
        tensor.shape[0] for key, tensor in load_file(tmp_path / "adapter_model.safetensors").items() if "lora_A" in key
    }
    assert ranks == {config["r"]}
    loaded = PeftModel.from_pretrained(cells.base_model(), tmp_path)
    torch.testing.assert_close(cells.logits(loaded), cells.logits(model), rtol=1e-5, atol=1e-5)


def test_an_adapter_that_is_not_the_active_one_can_be_exported(tmp_path: Path) -> None:
    model = cells.protected(seed=1)
    model.add_adapter("other", cells.config(seed=2))
    cells.perturb(model)
    export_lora(model, tmp_path, "other")
    model.set_adapter("other")
    loaded = PeftModel.from_pretrained(cells.base_model(), tmp_path)
    torch.testing.assert_close(cells.logits(loaded), cells.logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "pytorch_model.bin"])
def test_an_export_is_not_written_among_the_files_of_a_model(name: str, tmp_path: Path) -> None:
    """Who loads that model would get the adapter on top."""
    model, target = cells.protected(), tmp_path / "model"
    model.save_pretrained(tmp_path / "adapter")
    target.mkdir()
    (target / name).write_text("{}")
    for write in (lambda: export_lora(model, target), lambda: export_directory(tmp_path / "adapter", target)):
        with pytest.raises(ConfigError, match=f"holds a model .{name}"):
            write()
    assert [path.name for path in target.iterdir()] == [name]


def test_what_cannot_be_exported_is_refused_and_writes_nothing(tmp_path: Path) -> None:
    target = tmp_path / "out"
    plain = get_peft_model(cells.base_model(), LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(ProtectionError, match="no protected adapter"):
        export_lora(plain, target)
    with pytest.warns(UserWarning, match="no projection constrains"):
        tokens = get_peft_model(cells.base_model(), cells.config(trainable_token_indices=[1, 2]))
    with pytest.raises(ConfigError, match="trainable_token_indices"):
        export_lora(tokens, target)
    assert not (target / "adapter_model.safetensors").exists()
