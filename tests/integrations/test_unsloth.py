"""Unsloth's own source, which cannot be imported without a GPU: how it freezes again what it has made trainable."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from peft import get_peft_model

from peft_safety import GuardSpaceConfig
from tests.integrations.install import python_of
from tests.tiny import tiny_llama


def functions(package: str, file: str) -> dict[str, str]:
    """The source of the functions of one of Unsloth's files."""
    place = next(iter(python_of("unsloth").parents[1].glob(f"lib/python*/site-packages/{package}/{file}")), None)
    if place is None:
        pytest.skip("unsloth is not installed: make integrations")
    source = place.read_text(encoding="utf-8")
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef))
    return {node.name: ast.get_source_segment(source, node) or "" for node in nodes}


def test_a_frozen_factor_is_frozen_again(world: Path) -> None:
    """It makes every `lora_A` trainable, and its kernels read the weight itself; then it follows PEFT's list."""
    assert '".lora_A." in name' in functions("unsloth_zoo", "training_utils.py")["prepare_model_for_training"]
    assert "freeze_peft_variant_weights(model)" in functions("unsloth", "models/llama.py")["patch_peft_model"]
    subspace = str(world / "guardspace.safetensors")
    config = GuardSpaceConfig(r=4, target_modules="all-linear", subspace=subspace, train="B", a_init="random")
    model = get_peft_model(tiny_llama(), config)
    factors = {name: p.requires_grad_(True) for name, p in model.named_parameters() if "lora_" in name}

    scope: dict[str, object] = {}
    exec(functions("unsloth", "models/_utils.py")["freeze_peft_variant_weights"], scope)
    scope["freeze_peft_variant_weights"](model)  # type: ignore[operator]
    for name, parameter in factors.items():
        assert parameter.requires_grad == ("lora_B" in name), name
