"""Merging into quantized weights: what survives, what leaks, and the way that loses nothing."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn

from peft_safety import SaLoRAConfig, merge_quantized
from peft_safety.core.base_weights import dense_weight
from peft_safety.errors import ConfigError, LossyMergeError, ProtectionError
from peft_safety.layers import protected_leaves
from tests.peft import cells
from tests.peft.patch_cells import patched

LEAK = 1e-6
INITS = cells.INITS


def small(init: str = "lora", base: str = "nf4", **options: Any) -> PeftModel:
    """A protected adapter whose update is a few hundredths of the weight, as a fine-tune's is."""
    model = cells.protected(base, init, trained=True, **options)
    with torch.no_grad():
        for _, leaf in protected_leaves(model):
            start = torch.zeros_like(leaf.raw()) if leaf.initial is None else leaf.initial
            leaf.raw().copy_(start + 0.02 * (leaf.raw() - start))
    return model


def figures(model: PeftModel) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """dW, W and U of each module, before a merge, in fp64."""
    bases = model.peft_config["default"].subspace.bases
    updates = {name: delta.double() for name, delta in cells.deltas(model).items()}
    dense = {name: dense_weight(layer.get_base_layer()).double().clone() for name, layer in cells.layers_of(model)}
    return updates, dense, {name: bases[name]["out"].double() for name in updates}


@pytest.mark.parametrize(("to", "dtype"), [("16bit", torch.bfloat16), ("16bit", torch.float32), ("nf4", None)])
@pytest.mark.parametrize("init", INITS)
def test_the_figures_are_those_of_the_merged_weights(
    init: str, to: Any, dtype: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    model = small(init)
    updates, dense, bases = figures(model)
    result = merge_quantized(model, to, force=to == "nf4", **({} if dtype is None else {"dtype": dtype}))
    assert {row.module for row in result.modules} == set(updates)
    for row in result.modules:
        delta, layer = updates[row.module], result.model.get_submodule(row.module)
        assert type(layer).__name__ == ("Linear4bit" if to == "nf4" else "Linear")
        change = dense_weight(layer).double() - dense[row.module]
        assert row.norm == pytest.approx(float(delta.norm() / dense[row.module].norm()), rel=1e-4)
        assert row.kept == pytest.approx(float((change * delta).sum() / delta.square().sum()), rel=1e-3, abs=1e-4)
        assert row.error == pytest.approx(float((change - delta).norm() / delta.norm()), rel=1e-3, abs=1e-4)
        assert row.leak == pytest.approx(
            float((bases[row.module].T @ change).norm() / delta.norm()), rel=1e-2, abs=2e-6
        )
        if dtype is torch.float32:
            assert abs(row.kept - 1) <= 1e-5
            assert row.leak <= 1e-5  # fp32's spacing at W, of dW a hundred times smaller
        if to == "nf4":
            assert row.kept < 0.9
            assert row.leak > 1e-3
    shown = capsys.readouterr().out
    assert "kept" in shown
    assert f"all ({len(result.modules)})" in shown
    assert result.modules[0].module not in shown
    result.print(every_module=True)
    assert result.modules[0].module in capsys.readouterr().out
    assert json.loads(json.dumps(result.to_json()))["modules"][0]["module"] == result.modules[0].module


@pytest.mark.parametrize("lost", [False, True])
def test_an_update_below_the_rounding_of_16_bits_is_said(lost: bool, capsys: pytest.CaptureFixture[str]) -> None:
    model = small()
    with torch.no_grad():
        for _, leaf in protected_leaves(model):
            leaf.raw().mul_(1e-4 if lost else 1)
    merge_quantized(model, "16bit")
    shown = capsys.readouterr().out
    assert "leak: part of what was added" in shown
    assert ("16 bits round away more than the update. Keep the adapter beside the base" in shown) == lost


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_a_model_merged_in_16_bits_has_one_dtype_and_runs(base: str, prepared: bool, dtype: torch.dtype) -> None:
    """The rest of the model, a targeted head in it, is in bf16, or in fp32 after PEFT's preparation for training."""
    quantized = cells.base_model(base)
    for parameter in quantized.parameters():
        if parameter.dtype == torch.float32:
            parameter.data = parameter.data.bfloat16()
    untouched = quantized.model.layers[0].self_attn.k_proj.weight.data.clone()
    if prepared:
        quantized = prepare_model_for_kbit_training(quantized, use_gradient_checkpointing=False)
    names = [*cells.targets(base), "lm_head"]
    space = cells.random_subspace(quantized, names)
    model = get_peft_model(quantized, SaLoRAConfig(r=4, target_modules=names, subspace=space))
    cells.perturb(model)
    wide = merge_quantized(copy.deepcopy(model), dtype=torch.float32, verbose=False).model
    merged = merge_quantized(model, dtype=dtype, verbose=False).model
    assert {p.dtype for p in merged.parameters() if type(p) is nn.Parameter} == {dtype}
    assert torch.equal(merged.model.layers[0].self_attn.k_proj.weight.data, untouched), "it has no adapter"
    logits, expected = cells.logits(merged), cells.logits(wide)
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.float(), expected, rtol=0, atol=0.05 * float(expected.abs().max()))


def test_a_dense_model_keeps_its_dtype() -> None:
    merged = merge_quantized(cells.protected(trained=True), dtype=torch.bfloat16, verbose=False).model
    assert {p.dtype for p in merged.parameters()} == {torch.float32}


def test_an_update_of_which_all_is_kept_is_refused_by_its_error() -> None:
    """A large update survives in its own direction, and is refused for the noise beside it: the text says which."""
    model = cells.protected("nf4", trained=True)
    rows = merge_quantized(copy.deepcopy(model), "nf4", force=True, verbose=False).modules
    assert max(row.kept for row in rows) > 0.95
    worst = max(rows, key=lambda row: row.error)
    with pytest.raises(LossyMergeError, match=rf"{worst.module}: .* miss the update by {worst.error:.1%} of its norm"):
        merge_quantized(model, "nf4")


def test_quantizing_again_is_refused_with_its_figures_and_changes_nothing() -> None:
    model = small()
    before = cells.logits(model)
    with pytest.raises(LossyMergeError, match=r"would miss the update by [\d.]+% .* protected subspace") as caught:
        merge_quantized(model, "nf4")
    assert "nf4+residual" in str(caught.value)
    assert torch.equal(cells.logits(model), before)


@pytest.mark.parametrize("base", ["nf4", "int8"])
@pytest.mark.parametrize("init", INITS)
def test_the_residual_form_is_exact(init: str, base: str, tmp_path: Path) -> None:
    model = small(init, base=base)
    packed = {name: layer.get_base_layer().weight.data.clone() for name, layer in cells.layers_of(model)}
    before = cells.logits(model)
    updates, _, bases = figures(model)
    result = merge_quantized(model, "nf4+residual", verbose=False)
    assert type(result.model.peft_config["default"]) is LoraConfig
    assert not list(protected_leaves(result.model))
    tolerance = {"nf4": 1e-5, "int8": 1e-5}[base] * float(before.abs().max())
    torch.testing.assert_close(cells.logits(result.model), before, rtol=0, atol=tolerance)
    for name, delta in cells.deltas(result.model).items():
        torch.testing.assert_close(delta.double(), updates[name], rtol=1e-5, atol=1e-7)
        assert torch.equal(dict(cells.layers_of(result.model))[name].get_base_layer().weight.data, packed[name]), (
            "the quantized weight is left as it is"
        )
    for row in result.modules:
        assert abs(row.kept - 1) <= 1e-4
        assert row.leak <= 1e-5
    result.model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(cells.base_model(base), tmp_path)
    torch.testing.assert_close(cells.logits(loaded), cells.logits(result.model), rtol=0, atol=tolerance)
    assert cells.leak(loaded, subspace=_subspace(bases)) <= LEAK


def _subspace(bases: dict[str, torch.Tensor]) -> Any:
    from peft_safety import SafetySubspace

    return SafetySubspace({name: {"out": u.float()} for name, u in bases.items()})


def test_several_active_adapters_merge_as_their_sum() -> None:
    model = small(seed=1)
    model.add_adapter("second", cells.config(seed=2, target_modules=["q_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    before = cells.logits(model)
    for to in ("16bit", "nf4+residual"):
        result = merge_quantized(copy.deepcopy(model), to, dtype=torch.float32, verbose=False)
        torch.testing.assert_close(cells.logits(result.model), before, rtol=0, atol=1e-4 * float(before.abs().max()))
        by_kind = {row.module.rpartition(".")[2]: row for row in result.modules}
        assert by_kind["q_proj"].leak is None, "a sum of two adapters is bound by no one subspace"
        assert by_kind["v_proj"].leak is not None


def test_input_side_and_plain_adapters_are_measured_too() -> None:
    patch = cells.perturb(patched("nf4", side="in"))
    assert all(row.leak <= 1e-4 for row in merge_quantized(patch, "16bit", dtype=torch.float32, verbose=False).modules)
    plain = merge_quantized(cells.plain("nf4"), "16bit", verbose=False)
    assert {row.leak for row in plain.modules} == {None}


def test_an_untrained_adapter_has_nothing_to_lose() -> None:
    result = merge_quantized(cells.protected("nf4"), "nf4", force=True, verbose=False)
    assert all(math.isnan(row.kept) and row.norm == 0 for row in result.modules)
    assert result.to_json()["modules"][0]["kept"] is None
    merge_quantized(cells.protected("nf4"), "nf4", verbose=False)


def test_what_cannot_be_merged_is_refused() -> None:
    with pytest.raises(ConfigError, match="'16bit'"):
        merge_quantized(small(), "8bit")
    with pytest.raises(ConfigError, match="8bit weight cannot be merged to 'nf4'"):
        merge_quantized(small(base="int8"), "nf4", force=True)
    with pytest.raises(ConfigError, match="dense weight cannot be merged to 'nf4'"):
        merge_quantized(cells.protected(trained=True), "nf4", force=True)
    model = small()
    model.add_adapter("plain", LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "plain"])
    with pytest.raises(ProtectionError, match="plain"):
        merge_quantized(model, "16bit")


PARTIAL = {
    "rows": {"trainable_token_indices": [1, 2]},
    "copies": {"modules_to_save": ["lm_head"]},
    "dora": {"use_dora": True},
    "bias": {"lora_bias": True},
}


@pytest.mark.parametrize("to", ["16bit", "nf4+residual"])
@pytest.mark.parametrize("kind", PARTIAL)
def test_an_adapter_that_is_more_than_factors_is_refused_whole(kind: str, to: Any) -> None:
    model = cells.plain(**PARTIAL[kind])
    before = cells.logits(model)
    with pytest.raises(ConfigError, match=next(iter(PARTIAL[kind]))):
        merge_quantized(model, to, verbose=False)
    torch.testing.assert_close(cells.logits(model), before)


def test_an_update_that_is_no_product_of_its_factors_has_no_residual_form() -> None:
    """AdaLoRA has singular values between its factors."""
    config = AdaLoraConfig(target_modules=["q_proj"], total_step=10, init_r=4, target_r=2, tinit=1, tfinal=2)
    model = get_peft_model(cells.base_model(), config).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    before = cells.logits(model)
    with pytest.raises(ConfigError, match="no product of lora_A and lora_B"):
        merge_quantized(model, "nf4+residual", verbose=False)
    torch.testing.assert_close(cells.logits(model), before)
    merged = merge_quantized(model, verbose=False).model
    torch.testing.assert_close(cells.logits(merged), before, rtol=0, atol=1e-5 * float(before.abs().max()))


def test_an_init_that_changed_the_base_weight_is_merged_into_it_as_it_is() -> None:
    model = cells.plain(init_lora_weights="pissa")
    before = cells.logits(model)
    merged = merge_quantized(model, verbose=False).model
    torch.testing.assert_close(cells.logits(merged), before, rtol=0, atol=1e-5 * float(before.abs().max()))


@pytest.mark.parametrize("to", ["16bit", "nf4+residual", "nf4"])
def test_layers_without_an_active_adapter_are_left_as_they_are(to: Any) -> None:
    """Each of two adapters has layers of its own; the base weights under the one that is not active do not change."""
    model = cells.protected("nf4", target_modules=["q_proj"])
    model.add_adapter("second", cells.config("nf4", seed=2, target_modules=["v_proj"]))
    cells.perturb(model)
    names = {kind: f"model.layers.1.self_attn.{kind}_proj" for kind in "qv"}
    packed = model.get_base_model().get_submodule(names["v"]).get_base_layer().weight.data.clone()
    both = copy.deepcopy(model)
    both.base_model.set_adapter(["default", "second"])
    for given, kinds in ((model, "q"), (both, "qv")):
        before = cells.logits(given)
        result = merge_quantized(given, to, dtype=torch.float32, force=True, verbose=False)
        assert {row.module for row in result.modules if ".1." in row.module} == {names[kind] for kind in kinds}
        if to != "nf4":
            torch.testing.assert_close(cells.logits(result.model), before, rtol=0, atol=1e-5)
        if kinds == "q":
            base = result.model.get_base_model() if to == "nf4+residual" else result.model
            layer = base.get_submodule(names["v"])
            assert type(layer).__name__ == "Linear4bit"
            assert torch.equal(layer.weight.data, packed)
    model = cells.protected("nf4")
    model.base_model.set_adapter([])
    with pytest.raises(ConfigError, match="no layer has an active adapter"):
        merge_quantized(model, to, verbose=False)


def test_a_base_weight_of_zeros_has_no_relative_update(capsys: pytest.CaptureFixture[str]) -> None:
    model = cells.protected(trained=True)
    name, layer = next(iter(cells.layers_of(model)))
    layer.get_base_layer().weight.data.zero_()
    before = cells.logits(model)
    result = merge_quantized(model)
    torch.testing.assert_close(cells.logits(result.model), before, rtol=0, atol=1e-4 * float(before.abs().max()))
    row = next(row for row in result.modules if row.module == name)
    assert row.norm == math.inf
    assert row.kept == pytest.approx(1, abs=1e-4)
    assert json.loads(json.dumps(result.to_json(), allow_nan=False))["modules"][0]["norm"] is None
    assert "inf" in capsys.readouterr().out


def test_a_requantized_model_still_is_one(tmp_path: Path) -> None:
    model = small()
    expected = {
        row.module: row for row in merge_quantized(copy.deepcopy(model), "nf4", force=True, verbose=False).modules
    }
    merged = merge_quantized(model, "nf4", force=True, verbose=False).model
    assert torch.isfinite(cells.logits(merged)).all()
    assert not any("lora" in name for name, _ in merged.named_modules())
    again = copy.deepcopy(merged)
    assert torch.equal(cells.logits(again), cells.logits(merged))
    assert all(isinstance(merged.get_submodule(name), nn.Linear) for name in expected)


@pytest.mark.parametrize("to", ["16bit", "nf4+residual", "nf4"])
def test_the_command_merges_a_saved_adapter(to: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM
    from typer.testing import CliRunner

    from peft_safety.cli import app
    from tests.tiny import tiny_llama, tiny_tokenizer

    tiny_llama(hidden=64).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    options = {"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    base = tiny_llama(hidden=64)
    model = cells.perturb(
        get_peft_model(base, SaLoRAConfig(**options, subspace=cells.random_subspace(base, ["q_proj", "down_proj"])))
    )
    model.save_pretrained(tmp_path / "adapter")
    arguments = [
        "export",
        str(tmp_path / "adapter"),
        "--out",
        str(tmp_path / "out"),
        "--merge-to",
        to,
        "--model",
        str(tmp_path / "base"),
        "--json",
    ]
    if to == "nf4":
        refused = CliRunner().invoke(app, arguments)
        assert isinstance(refused.exception, LossyMergeError)
        arguments.append("--force")
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    found = json.loads(done.stdout[done.stdout.index("{") :])
    assert {row["module"].rpartition(".")[2] for row in found["modules"]} == {"q_proj", "down_proj"}
    assert json.loads((tmp_path / "out" / "merge.json").read_text()) == found
    if to == "nf4+residual":
        assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    else:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        kinds = {type(loaded.get_submodule(row["module"])).__name__ for row in found["modules"]}
        assert kinds == {"Linear" if to == "16bit" else "Linear4bit"}, (
            "what was merged in 16 bits must not be quantized by the next load"
        )
        assert type(loaded.get_submodule("model.layers.0.self_attn.k_proj")).__name__ == (
            "Linear" if to == "16bit" else "Linear4bit"
        ), "the adapter was trained on a dense base"
        assert type(loaded.lm_head) is torch.nn.Linear
