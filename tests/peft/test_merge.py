"""Into the base weights, into another adapter, and out again."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import nn

from peft_safety import assert_protected, merge_quantized
from peft_safety.errors import ConfigError, LossyMergeError, PeftSafetyError
from peft_safety.layers import protected_leaves
from tests.peft import cells

LEAK = 1e-6
DENSE = [(base, init) for base in ("linear", "conv1d") for init in cells.INITS]
QUANTIZED = [(base, init) for base in ("nf4", "int8") for init in cells.INITS]


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize(("base", "init"), DENSE)
def test_merging_keeps_the_function_and_unmerging_restores_it(base: str, init: str, safe_merge: bool) -> None:
    model = cells.protected(base, init, trained=True)
    before, weights = (
        cells.logits(model),
        {name: layer.get_base_layer().weight.clone() for name, layer in cells.layers_of(model)},
    )
    model.merge_adapter(safe_merge=safe_merge)
    torch.testing.assert_close(cells.logits(model), before, rtol=1e-6, atol=2e-6)
    assert any(not torch.equal(layer.get_base_layer().weight, weights[name]) for name, layer in cells.layers_of(model))
    model.unmerge_adapter()
    torch.testing.assert_close(cells.logits(model), before, rtol=1e-6, atol=2e-6)
    for name, layer in cells.layers_of(model):
        torch.testing.assert_close(layer.get_base_layer().weight, weights[name], rtol=1e-6, atol=1e-6)
    merged = model.merge_and_unload(safe_merge=safe_merge)
    assert not any(
        isinstance(module, type(model.base_model)) or "lora" in name for name, module in merged.named_modules()
    )
    torch.testing.assert_close(cells.logits(merged), before, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize(("base", "init"), DENSE)
def test_a_merge_moves_the_weight_outside_the_protected_directions_only(base: str, init: str) -> None:
    model = cells.protected(base, init, trained=True)
    subspace = model.peft_config["default"].subspace
    before = {name: layer.get_base_layer().weight.double().clone() for name, layer in cells.layers_of(model)}
    model.merge_adapter()
    for name, layer in cells.layers_of(model):
        moved = layer.get_base_layer().weight.double() - before[name]
        moved = moved.T if base == "conv1d" else moved
        # the sum is rounded to fp32 at the scale of W, not of dW
        assert float((subspace.bases[name]["out"].double().T @ moved).norm() / before[name].norm()) <= LEAK
        assert float(moved.norm() / before[name].norm()) > 1e-2


def test_several_adapters_merge_together() -> None:
    model = cells.protected(seed=1)
    model.add_adapter("other", cells.config("linear", "task", seed=2))
    cells.perturb(model)
    model.base_model.set_adapter(["default", "other"])
    before = cells.logits(model)
    torch.testing.assert_close(
        cells.logits(model.merge_and_unload(adapter_names=["default", "other"])), before, rtol=1e-6, atol=2e-6
    )


def test_a_merged_adapter_is_neither_exported_nor_merged_twice(tmp_path: Path) -> None:
    from peft_safety import export_lora

    model = cells.protected(trained=True)
    model.merge_adapter()
    with pytest.raises(ConfigError, match="unmerge"):
        export_lora(model, tmp_path)
    with pytest.raises(ConfigError, match="unmerge"):
        merge_quantized(model)


@pytest.mark.parametrize("how", ["merge_and_unload", "merge_adapter", "by name"])
@pytest.mark.parametrize(("base", "init"), QUANTIZED)
def test_merging_into_k_bit_weights_is_refused_with_the_figure(base: str, init: str, how: str) -> None:
    model = cells.protected(base, init, trained=True)
    before = cells.logits(model)
    if how == "by name":
        model.add_adapter("other", cells.config(base, init, seed=3))
        model.set_adapter("other")
    merge = {"by name": lambda: model.merge_and_unload(adapter_names=["default"])}.get(how) or getattr(model, how)
    with pytest.raises(LossyMergeError, match="would miss") as caught:
        merge()
    error = float(re.search(r"would miss .* by ([\d.]+)% of its norm", str(caught.value)).group(1))
    assert 0 < error < 200
    assert "merge_quantized" in str(caught.value)
    model.set_adapter("default")
    assert torch.equal(cells.logits(model), before)


def test_plain_lora_beside_a_protected_adapter_may_merge_into_k_bit_weights() -> None:
    """The refusal is about protected updates, not about PEFT's own."""
    model = cells.protected("nf4")
    model.add_adapter("plain", LoraConfig(r=2, target_modules=cells.targets("nf4"), init_lora_weights=False))
    model.set_adapter("plain")
    model.merge_adapter()
    assert all(layer.merged_adapters == ["plain"] for _, layer in cells.layers_of(model))


@pytest.mark.parametrize(("base", "init"), QUANTIZED)
def test_merging_into_dequantized_weights_keeps_the_function(base: str, init: str) -> None:
    from peft_safety.core.base_weights import dense_weight

    model = cells.protected(base, init, trained=True)
    updates, subspace = cells.deltas(model), model.peft_config["default"].subspace
    dense = {name: dense_weight(layer.get_base_layer()) for name, layer in cells.layers_of(model)}
    before, ids = cells.logits(model), cells.tokens()
    merged = merge_quantized(model, dtype=torch.float32, verbose=False).model
    for name, weight in dense.items():
        layer = merged.get_submodule(name)
        assert type(layer) is nn.Linear
        torch.testing.assert_close(layer.weight - weight, updates[name], rtol=1e-4, atol=1e-6)
        assert float((subspace.bases[name]["out"].T @ (layer.weight - weight)).norm() / weight.norm()) <= LEAK
    # int8 kernels also quantize the activations, to 8 bits
    tolerance = {"nf4": 1e-4, "int8": 5e-2}[base] * float(before.abs().max())
    torch.testing.assert_close(cells.logits(merged, ids), before, rtol=0, atol=tolerance)


def test_convert_to_lora_gives_the_update_itself() -> None:
    peft = pytest.importorskip("peft")
    if not hasattr(peft, "convert_to_lora"):
        pytest.skip(f"peft {peft.__version__} has no convert_to_lora (0.19 and later have)")
    for init in cells.INITS:
        model = cells.protected("linear", init, trained=True)
        expected, subspace = cells.deltas(model), model.peft_config["default"].subspace
        config, state = peft.convert_to_lora(model, rank=8)
        assert type(config) is LoraConfig
        plain = get_peft_model(cells.base_model(), config)
        peft.set_peft_model_state_dict(plain, state)
        found = cells.deltas(plain)
        for name, delta in expected.items():
            torch.testing.assert_close(found[name], delta, rtol=1e-4, atol=1e-5)
        assert cells.leak_of(found, subspace) <= 2 * LEAK  # one more SVD in fp32


def save(tmp_path: Path, name: str, **options: object) -> tuple[Path, PeftModel]:
    model = cells.protected(trained=True, **options)
    model.save_pretrained(tmp_path / name)
    return tmp_path / name, model


@pytest.mark.parametrize("rank", [4, 2])
@pytest.mark.parametrize("prepared", [False, True])
def test_a_hot_swap_brings_factors_scales_and_bases_along(prepared: bool, rank: int, tmp_path: Path) -> None:
    directory, expected = save(tmp_path, "b", seed=2, r=rank, lora_alpha=3)
    model = cells.protected(seed=1, trained=True)
    if prepared:
        before = cells.logits(model)
        prepare_model_for_compiled_hotswap(model, target_rank=6)
        assert_protected(model)
        torch.testing.assert_close(cells.logits(model), before, rtol=1e-5, atol=1e-6)
    hotswap_adapter(model, str(directory), "default")
    assert_protected(model)
    torch.testing.assert_close(cells.logits(model), cells.logits(expected), rtol=1e-5, atol=1e-6)
    assert cells.leak(model, subspace=expected.peft_config["default"].subspace) <= LEAK
    cells.train(model.train(), cells.adamw, 3)
    assert cells.leak(model) <= LEAK


def test_a_prepared_model_trains_protected() -> None:
    model = cells.protected()
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    cells.train(model, cells.adamw, 5)
    assert_protected(model)
    assert all(leaf.raw().shape[1] == 8 for _, leaf in protected_leaves(model))
    assert cells.leak(model) <= LEAK


def test_a_compiled_model_serves_the_swapped_adapter_without_a_new_graph(tmp_path: Path) -> None:
    directory, expected = save(tmp_path, "b", seed=2, r=2)
    torch._dynamo.reset()
    model = cells.protected(seed=1, trained=True)
    prepare_model_for_compiled_hotswap(model, target_rank=4)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    cells.logits(compiled)
    with torch._dynamo.config.patch(error_on_recompile=True):
        hotswap_adapter(compiled, str(directory), "default")
        found = cells.logits(compiled)
    torch.testing.assert_close(found, cells.logits(expected), rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()


def test_a_hot_swap_that_would_lose_protection_is_refused(tmp_path: Path) -> None:
    plain = get_peft_model(
        cells.base_model(), LoraConfig(r=4, target_modules=cells.targets("linear"), init_lora_weights=False)
    )
    plain.save_pretrained(tmp_path / "plain")
    fewer, _ = save(tmp_path, "fewer", target_modules=["q_proj"])
    task = cells.protected("linear", "task", trained=True)
    task.save_pretrained(tmp_path / "task")
    model = cells.protected(trained=True)
    before = cells.logits(model)
    for directory in (tmp_path / "plain", fewer, tmp_path / "task"):
        with pytest.raises(PeftSafetyError):
            hotswap_adapter(model, str(directory), "default")
        assert torch.equal(cells.logits(model), before)
        assert_protected(model)
