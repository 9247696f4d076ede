"""Single 4-bit layers under an adapter, for the tests of the fused path."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_safety import SafetySubspace, SaLoRAConfig
from peft_safety.core.projection import orthonormalize
from tests.peft import cells


def layer_of(model: nn.Module, kind: str = "q_proj") -> Any:
    return next(layer for name, layer in cells.layers_of(model) if name.endswith(kind))


def quantized(layer: Any, quant_type: str = "nf4", bias: bool = False, **options: Any) -> Any:
    """A single LoRA layer on a 4-bit one, in a model that PEFT takes."""
    model = nn.Sequential(bnb.nn.Linear4bit(64, 48, bias=bias, compute_dtype=torch.float32, quant_type=quant_type))
    model[0].support_avx512bf16_for_cpu = False
    torch.manual_seed(1)
    model[0].weight = bnb.nn.Params4bit(torch.randn(48, 64), requires_grad=False, quant_type=quant_type, **options)
    model.is_loaded_in_4bit = True
    return get_peft_model(model.to("cpu"), layer)


def plain(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": ["0"], "init_lora_weights": False, **options})


def protected(**options: Any) -> SaLoRAConfig:
    basis = orthonormalize(torch.randn(48, 4, generator=torch.Generator().manual_seed(0)))
    space = SafetySubspace({"0": {"out": basis}})
    return SaLoRAConfig(**{"r": 4, "target_modules": ["0"], "init_lora_weights": False, "subspace": space, **options})
