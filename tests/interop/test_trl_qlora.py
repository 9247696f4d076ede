"""TRL casts the adapter of a quantized model to bf16. What is saved and exported keeps the constraint in fp32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from peft_safety import GuardSpaceConfig, SafetySubspace, SaLoRAConfig, assert_protected, export_lora, verify
from peft_safety.cli import app
from peft_safety.core.adapter_dir import seal
from peft_safety.core.plain_lora import ADAPTER_FILE, PREFIX
from peft_safety.core.projection import orthonormalize
from peft_safety.core.targets import target_layers
from peft_safety.layers import protected_leaves
from tests.interop.test_trl import OPTIONS, completions
from tests.peft import cells
from tests.tiny import tiny_tokenizer

trl = pytest.importorskip("trl")

LEAK = 1e-6
KINDS = ("salora", "residual", "A", "both", "window", "B")


def subspace(model: torch.nn.Module) -> SafetySubspace:
    generator = torch.Generator().manual_seed(0)
    layers = target_layers(model, cells.targets("nf4"))
    sizes = {name: {"out": layer.out_features, "in": layer.in_features} for name, layer in layers.items()}
    return SafetySubspace(
        {
            name: {side: orthonormalize(torch.randn(d, 4, generator=generator)) for side, d in sides.items()}
            for name, sides in sizes.items()
        }
    )


def config(kind: str, space: SafetySubspace) -> Any:
    common: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": cells.targets("nf4"), "subspace": space}
    if kind == "salora":
        return SaLoRAConfig(**common)
    if kind == "residual":
        task = cells.random_subspace(cells.base_model("nf4"), common["target_modules"], seed=5, k=8)
        return SaLoRAConfig(**common, init="task", task_data=task)
    if kind == "both":
        return GuardSpaceConfig(**common, train="A", combine="salora")
    return GuardSpaceConfig(**common, train=kind, a_init="random", window=8)


def worst(directory: Path, kind: str, space: SafetySubspace) -> float:
    """The largest share of a stored update in the protected span, on the sides that this kind keeps out of it."""
    tensors = load_file(directory / ADAPTER_FILE)
    shares = []
    for name, sides in space.bases.items():
        kinds = ("weight", "initial") if f"{PREFIX}{name}.lora_B.initial" in tensors else ("weight",)
        a, b = ([tensors[f"{PREFIX}{name}.lora_{x}.{k}"].double() for k in kinds] for x in "AB")
        update = b[0] @ a[0] - (b[1] @ a[1] if len(kinds) == 2 else 0)
        assert update.any(), "an untrained factor leaks nothing"
        if kind in ("salora", "residual", "both"):
            shares.append(float((sides["out"].double().T @ update).norm() / update.norm()))
        if kind in ("A", "both", "window", "B"):
            shares.append(float((update @ sides["in"].double()).norm() / update.norm()))
    return max(shares)


@pytest.mark.parametrize("kind", KINDS)
def test_what_sft_saves_of_a_four_bit_model_leaks_no_more_than_fp32(tmp_path: Path, kind: str) -> None:
    space = subspace(cells.base_model("nf4"))
    run = trl.SFTTrainer(
        model=cells.base_model("nf4"),
        args=trl.SFTConfig(output_dir=str(tmp_path), max_length=64, **OPTIONS),
        train_dataset=completions(False),
        processing_class=tiny_tokenizer(),
        peft_config=config(kind, space),
    )
    assert {p.dtype for p in run.model.parameters() if p.requires_grad} == {torch.bfloat16}, "the cast of TRL"
    run.train()
    model = run.model.eval()
    assert_protected(model)
    before = cells.logits(model)
    run.save_model(str(tmp_path / "native"))
    found = verify(tmp_path / "native", subspace=space if kind in ("window", "B") else None)
    assert found.worst_leak <= LEAK
    assert found.rounded_to is None
    assert worst(tmp_path / "native", kind, space) <= LEAK
    if kind != "B":  # which is a plain LoRA already
        export_lora(model, tmp_path / "plain")
        assert worst(tmp_path / "plain", kind, space) <= LEAK
    for directory in (tmp_path / "native", *([] if kind == "B" else [tmp_path / "plain"])):
        loaded = PeftModel.from_pretrained(cells.base_model("nf4"), directory).eval()
        difference = float((cells.logits(loaded) - before).abs().max())
        change = float((before - cells.logits(cells.base_model("nf4"))).abs().max())
        assert difference <= 0.05 * change, "the function that was trained, up to bf16"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_factor_in_16_bits_is_folded_to_its_rounding(dtype: torch.dtype) -> None:
    """A raw factor that the optimizer has moved a little way into the span is projected for whoever reads it."""
    model = get_peft_model(cells.base_model(), cells.config())
    for _, leaf in protected_leaves(model):
        raw = leaf.raw()
        raw.data = torch.randn(raw.shape, generator=torch.Generator().manual_seed(7))
        inside = leaf.basis @ (leaf.basis.T @ raw.data)
        raw.data = (raw.data - inside + 0.02 * inside / inside.norm() * raw.data.norm()).to(dtype)
        read = leaf.weight.detach().double()
        share = float((leaf.basis.double().T @ read).norm() / read.norm())
        assert share <= torch.finfo(dtype).eps / 2


def test_verify_says_what_rounding_to_16_bits_lets_through(tmp_path: Path) -> None:
    cells.protected(trained=True).save_pretrained(tmp_path)
    exact = verify(tmp_path)
    assert (exact.rounded_to, exact.worst_leak <= LEAK) == (None, True)
    tensors = load_file(tmp_path / ADAPTER_FILE)
    save_file({key: value.bfloat16() for key, value in tensors.items()}, tmp_path / ADAPTER_FILE)
    seal(tmp_path)  # by somebody who stores adapters in 16 bits
    rounded = verify(tmp_path)
    assert rounded.rounded_to == "bfloat16"
    assert 1e-4 < rounded.worst_leak < 4e-3
    table = CliRunner().invoke(app, ["verify", str(tmp_path)], catch_exceptions=False).stdout
    assert "the rounding to bfloat16" in " ".join(table.split())
    facts = json.loads(CliRunner().invoke(app, ["verify", str(tmp_path), "--json"]).stdout)
    assert facts["rounded_to"] == "bfloat16"
