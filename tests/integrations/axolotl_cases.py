"""Runs in axolotl's environment, with a YAML file: its own config loader and model loader on variants of the file."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from axolotl.cli.config import load_cfg
from axolotl.loaders import ModelLoader, load_tokenizer
from axolotl.utils.dict import DictDefault

from peft_safety.errors import PeftSafetyError

FILE = sys.argv[1]


def loaded(**keys: Any) -> tuple[Any, Any, DictDefault]:
    cfg = load_cfg(FILE, **keys)
    model, config = ModelLoader(cfg, load_tokenizer(cfg)).load()
    return model, config, cfg


def refused(text: str, **keys: Any) -> None:
    with pytest.raises((ValueError, PeftSafetyError), match=text):
        loaded(**keys)


# before axolotl patches the attention for its kernels
residual = {"init": "guardspace", "init_data": "task.jsonl", "subspace": "guardspace.safetensors"}
model, config, cfg = loaded(peft_safety=residual)  # the plugin itself checks that its update is zero
layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
assert layer.lora_A["default"].initial is not None, layer

refused("safety_rnk", peft_safety={"safety_rnk": 8})
refused("LoRA's", peft_safety={"r": 8})
refused("adapter: lora has no options", adapter="lora")
refused("lora_qkv_kernel", lora_qkv_kernel=True, peft_safety={"train": "A", "subspace": "guardspace.safetensors"})
refused("use_dora", peft_use_dora=True)
refused("no protected adapter", lora_model_dir="plain")
refused("lora_model_dir", lora_model_dir="plain", rl="dpo")

model, config, cfg = loaded(rl="dpo")
assert not hasattr(model, "peft_config"), "the trainer injects the adapter"
assert type(config).__name__ == "GuardSpaceConfig"
assert (config.r, config.lora_alpha, config.freezes) == (4, 8, True)

model, config, cfg = loaded(load_in_4bit=True)
assert cfg.adapter == "guardspace"
layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
assert type(layer.base_layer).__name__ == "Linear4bit", layer
assert type(layer.lora_A["default"]).__name__ == "FrozenLinear", layer
print("all cases")
