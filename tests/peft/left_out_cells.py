"""Models with layers that no calibration token reaches, or that are too narrow for a basis."""

from __future__ import annotations

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import (
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from peft_safety import (
    SafetySubspace,
)
from tests.tiny import tiny_llama

ALL = {"target_modules": "all-linear", "progress": False}
TOWER = ["model.tower.0", "model.tower.1.fc"]
GATES = ["model.layers.0.mlp.shared_expert_gate", "model.layers.1.mlp.shared_expert_gate"]


def batch(rows=8, length=12, seed=0):
    ids = torch.randint(4, 200, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def with_tower() -> nn.Module:
    model = tiny_llama()
    torch.manual_seed(0)
    model.model.tower = nn.Sequential(nn.Linear(8, 8), nn.ModuleDict({"fc": nn.Linear(8, 4)}))
    return model


def moe(seed=0) -> nn.Module:
    torch.manual_seed(seed)
    sizes = dict(hidden_size=32, intermediate_size=64, moe_intermediate_size=16, shared_expert_intermediate_size=48)
    heads = dict(
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, num_experts=4, num_experts_per_tok=2
    )
    return Qwen2MoeForCausalLM(
        Qwen2MoeConfig(vocab_size=260, **sizes, **heads, bos_token_id=1, eos_token_id=2, pad_token_id=3)
    ).eval()


def guard(model, data=None, **options):
    return SafetySubspace.from_activations(
        model, data or [batch()], **{"method": "guardspace", "rank": 0.25, **ALL, **options}
    )


def ours(caught) -> list[str]:
    return [str(w.message) for w in caught if issubclass(w.category, UserWarning) and "left out" in str(w.message)]


def adapted(model: nn.Module) -> set[str]:
    return {
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and len(module.lora_A)
    }
