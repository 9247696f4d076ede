"""Kinds of base weights. Those that torch and bitsandbytes have are run here, the others by tests of their own."""

from __future__ import annotations

from typing import Any

import torch

from tests.peft import cells

RUN = {
    "fp32": ("linear", torch.float32),
    "bf16": ("linear", torch.bfloat16),
    "Conv1D (GPT-2)": ("conv1d", torch.float32),
    "bitsandbytes NF4": ("nf4", torch.float32),
    "bitsandbytes int8": ("int8", torch.float32),
}
"""Kind of `cells.base_model`, and dtype."""
LIBRARY = {
    "torchao int8 weights": "int8 weights",
    "torchao int8 dynamic": "int8 dynamic",
    "torchao int4": "int4",
    "torchao int4 dynamic": "int4 dynamic",
    "torchao fp8 weights": "fp8 weights",
    "HQQ": "HQQ",
}
"""Kinds of `tests/peft/test_libraries.py`, on the libraries themselves, which the nightly run installs."""
PACKED = {
    "AQLM": "AqlmLoraLinear",
    "AWQ": "AwqLoraLinear",
    "EETQ": "EetqLoraLinear",
    "GPTQ": "GPTQLoraLinear",
    "HQQ": "HqqLoraLinear",
    "Intel Neural Compressor": "IncLoraLinear",
    "torchao": "TorchaoLoraLinear",
}
"""PEFT's class for each, on stand-ins for what is not installed; `tests/peft/test_packed.py` has their cells."""
PACKED_CELLS = {
    "LoRA": ("works", "test_a_frozen_a_on_a_layer_that_peft_knows"),
    "GuardSpace B": ("limit", "test_a_frozen_a_on_a_layer_that_peft_knows"),
    "GuardSpace window": ("limit", "test_the_forms_that_project_work_there_too"),
    "GuardSpace A": ("limit", "test_the_forms_that_project_work_there_too"),
    "SaLoRA": ("no", "test_what_needs_the_weight_is_refused_there"),
}
PACKED_REFUSED = "A basis of outputs is computed from the weight, which only its own library can read."
PACKED_LIMIT = "Merging into a packed weight is refused; export the adapter and keep it beside the base."
LIBRARY_LIMIT = "Merging into the weight is refused; `merge_quantized` makes a 16-bit model."
QUANTIZED_LIMIT = "Merging into the k-bit weight is refused with its error; `merge_quantized` makes a 16-bit model."


def model_of(name: str) -> Any:
    kind, dtype = RUN[name]
    model = cells.base_model(kind)
    return model if dtype == torch.float32 else model.to(dtype)


def batch_of(seed: int) -> dict[str, torch.Tensor]:
    ids = cells.tokens(seed=seed)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def options_of(name: str) -> dict[str, Any]:
    kind, _ = RUN[name]
    return {"target_modules": cells.targets(kind), "fan_in_fan_out": kind == "conv1d"}
