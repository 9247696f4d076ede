"""Every form on bases that torchao, HQQ and gptqmodel quantize themselves, on this CPU. It needs these libraries,
which `make nightly` installs apart from the environment.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from peft_safety import (
    GuardSpaceConfig,
    OrthoSafetyPatchConfig,
    SafetySubspace,
    SaLoRAConfig,
    assert_protected,
    calibrate,
    explain_dispatch,
    export_lora,
    merge_quantized,
    verify,
)
from peft_safety.core import base_weights as weights
from peft_safety.core.scales import library
from peft_safety.errors import LossyMergeError, UnsupportedLayerError
from tests.peft import cells

LEAK = 1e-6
TARGETS = ["q_proj", "v_proj", "down_proj"]
FORMS = {
    "B": lambda **o: GuardSpaceConfig(**o, train="B", a_init="random"),
    "A": lambda **o: GuardSpaceConfig(**o, train="A"),
    "window": lambda **o: GuardSpaceConfig(**o, train="window", window=8, a_init="random"),
    "residual": lambda **o: GuardSpaceConfig(**o, train="A", init="guardspace", init_data=[batch()]),
    "SaLoRA": SaLoRAConfig,
    "patch": OrthoSafetyPatchConfig,
}
TORCHAO = {
    "int8 weights": ("Int8WeightOnlyConfig", {}),
    "int8 dynamic": ("Int8DynamicActivationInt8WeightConfig", {}),
    "int4": ("IntxWeightOnlyConfig", {"weight_dtype": torch.int4}),
    "int4 dynamic": ("Int8DynamicActivationIntxWeightConfig", {"weight_dtype": torch.int4}),
    "fp8 weights": ("Float8WeightOnlyConfig", {}),
}
"""What computes on a CPU. The packed int4 layouts and dynamic FP8 need a GPU."""


def batch(seed: int = 0) -> dict[str, torch.Tensor]:
    ids = cells.tokens(rows=6, seed=seed)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def base_model(kind: str, seed: int = 0) -> nn.Module:
    model = cells.base_model(seed=seed)
    if kind == "HQQ":
        hqq = pytest.importorskip("hqq.core.quantize", reason="hqq is not installed")
        for name, layer in list(model.named_modules()):
            if name.endswith(tuple(TARGETS)):
                options = hqq.BaseQuantizeConfig(nbits=4, group_size=8)
                made = hqq.HQQLinear(layer, options, compute_dtype=torch.float32, device="cpu")
                model.set_submodule(name, made)
        return model
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    name, options = TORCHAO[kind]
    if kind.startswith("int4"):
        granularity = pytest.importorskip("torchao.quantization.granularity").PerGroup(32)
        options = {**options, "granularity" if kind == "int4" else "weight_granularity": granularity}
    own = getattr(quantization, name)(**options)
    quantization.quantize_(model, own, filter_fn=lambda _, full: full.endswith(tuple(TARGETS)))
    return model


def assert_same(kind: str, model: nn.Module, other: nn.Module) -> None:
    """One function; dynamic kinds round the inputs of each layer, so that a last bit becomes a step of 8 bits."""
    found, wanted = cells.logits(model), cells.logits(other)
    if "dynamic" in kind:
        assert float((found - wanted).norm() / wanted.norm()) < 0.01
    else:
        cells.assert_same_function(found, wanted)


KINDS = [*TORCHAO, "HQQ"]


@pytest.mark.filterwarnings("ignore:.*instantiated without", "ignore:Unsupported layer type")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_life_of_an_adapter(kind, form, tmp_path):
    base = base_model(kind)
    given: Any = FORMS[form](r=4, target_modules=TARGETS, safety_rank=6)
    space = calibrate(base, given, [batch()], progress=False)
    assert space.provenance["precision"] == ("hqq" if kind == "HQQ" else "torchao")
    given.subspace = space
    plain = get_peft_model(base_model(kind), LoraConfig(r=4, target_modules=TARGETS))
    first, _ = next(iter(cells.layers_of(plain)))
    names = {type(layer).__name__ for _, layer in cells.layers_of(plain)}
    model = get_peft_model(base, given)
    assert {type(layer).__name__ for _, layer in cells.layers_of(model)} == names
    before = cells.logits(model)
    cells.train(model, cells.adamw, 10)
    assert not torch.equal(cells.logits(model.eval()), before), "it has learned something"
    model.save_pretrained(tmp_path / "adapter")
    found = verify(tmp_path / "adapter", base_model(kind), None if form in ("SaLoRA", "patch", "residual") else space)
    assert (found.base_checked, found.worst_leak <= LEAK) == (True, True)
    loaded = PeftModel.from_pretrained(base_model(kind), tmp_path / "adapter").eval()
    assert_protected(loaded)
    assert_same(kind, loaded, model)
    export_lora(model, tmp_path / "plain")
    exported = PeftModel.from_pretrained(base_model(kind), tmp_path / "plain").eval()
    assert_same(kind, exported, model)
    for refused in (model.merge_and_unload, model.merge_adapter, dict(cells.layers_of(model))[first].merge):
        with pytest.raises(LossyMergeError, match=r"merging into a (torchao|hqq) weight"):
            refused()
    assert_same(kind, model, loaded)


@pytest.mark.filterwarnings("ignore:.*instantiated without", "ignore:Unsupported layer type")
@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_is_what_the_layer_multiplies_with(kind):
    base = base_model(kind)
    layers = {name: layer for name, layer in base.named_modules() if name.endswith(tuple(TARGETS))}
    name, layer = next(iter(layers.items()))
    assert library(layer) == weights.quantization(layer)
    weight = weights.dense_weight(layer, name)
    x = torch.randn(64, weight.shape[1])
    with torch.no_grad():
        error = float((layer(x) - x @ weight.mT).norm() / (x @ weight.mT).norm())
    assert error < (0.02 if "dynamic" in kind else 1e-5), "dynamic kinds round the inputs, too"
    dense = cells.base_model()
    space = SafetySubspace.from_weights(dense, rank=4, target_modules=TARGETS, progress=False)
    space.check_fits(layers, ("in",))
    other = base_model(kind, seed=1)
    with pytest.raises(ValueError, match="other base weights"):
        space.check_fits({name: other.get_submodule(name) for name in layers}, ("in",))


@pytest.mark.filterwarnings("ignore:.*instantiated without", "ignore:Unsupported layer type")
@pytest.mark.parametrize("kind", ["int8 weights", "HQQ"])
def test_a_model_merged_to_16_bit_computes_what_the_adapter_computed(kind, monkeypatch):
    given = SaLoRAConfig(r=4, target_modules=TARGETS, safety_rank=6)
    base = base_model(kind)
    given.subspace = calibrate(base, given, [batch()], progress=False)
    model = get_peft_model(base, given)
    cells.train(model, cells.adamw, 10)
    before = cells.logits(model.eval())
    monkeypatch.setenv("PEFT_SAFETY_FUSED", "1")
    assert {row.reason for row in explain_dispatch(model)} == {
        f"a base weight of {'hqq' if kind == 'HQQ' else 'torchao'}"
    }
    merged = merge_quantized(model, dtype=torch.float32, verbose=False).model
    assert all(type(layer) is nn.Linear for name, layer in merged.named_modules() if name.endswith(tuple(TARGETS)))
    torch.testing.assert_close(cells.logits(merged), before, rtol=1e-4, atol=1e-4)


def test_a_library_that_cannot_dequantize_a_weight_is_refused_by_name(monkeypatch):
    base = base_model("int8 weights")
    layer = next(layer for name, layer in base.named_modules() if name.endswith("q_proj"))

    def refuse(*_, **__):
        raise NotImplementedError

    monkeypatch.setattr(type(layer.weight), "dequantize", refuse)
    with pytest.raises(UnsupportedLayerError, match=r"q_proj: .*torchao cannot dequantize its weight here"):
        calibrate(base, SaLoRAConfig(r=4, target_modules=["q_proj"], safety_rank=6), [batch()], progress=False)


def gptq_model(seed: int = 0) -> nn.Module:
    """Four bits, rounded to nearest: which values the integers have is no matter here."""
    pytest.importorskip("optimum", reason="optimum is not installed, without which PEFT does not look for GPTQ")
    kind = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch", reason="gptqmodel is not installed").TorchLinear
    model = cells.base_model(seed=seed)
    for name, layer in list(model.named_modules()):
        if name.endswith(GPTQ_TARGETS):
            m, n = layer.weight.shape
            made = kind(bits=4, group_size=32, sym=True, desc_act=False, in_features=n, out_features=m)
            scales = (layer.weight.detach().reshape(m, -1, 32).abs().amax(-1) / 7).clamp(min=1e-5)
            index = (torch.arange(n) // 32).int()
            made.pack_original(layer, scales, torch.full_like(scales, 8.0), index)
            made.post_init()
            made.optimized = True  # no compilation
            model.set_submodule(name, made.eval())
    return model


GPTQ_TARGETS = ("q_proj", "down_proj")


@pytest.mark.parametrize("form", ["B", "A", "window"])
def test_the_life_of_an_adapter_on_gptq(form, tmp_path):
    base = gptq_model()
    given: Any = FORMS[form](r=4, target_modules=list(GPTQ_TARGETS), safety_rank=6)
    given.subspace = space = calibrate(base, given, [batch()], progress=False)
    model = get_peft_model(base, given)
    assert {type(layer).__name__ for _, layer in cells.layers_of(model)} == {"GPTQLoraLinear"}
    before = cells.logits(model)
    cells.train(model, cells.adamw, 10)
    assert not torch.equal(cells.logits(model.eval()), before), "it has learned something"
    model.save_pretrained(tmp_path / "adapter")
    found = verify(tmp_path / "adapter", gptq_model(), space)
    assert (found.base_checked, found.blindness_checked, found.worst_leak <= LEAK) == (True, True, True)
    loaded = PeftModel.from_pretrained(gptq_model(), tmp_path / "adapter").eval()
    assert_protected(loaded)
    cells.assert_same_function(cells.logits(loaded), cells.logits(model))
    export_lora(model, tmp_path / "plain")
    exported = PeftModel.from_pretrained(gptq_model(), tmp_path / "plain").eval()
    cells.assert_same_function(cells.logits(exported), cells.logits(model))
    with pytest.raises(LossyMergeError, match="cannot be merged into"):
        model.merge_adapter()


def test_a_basis_of_outputs_is_refused_on_gptq():
    given = SaLoRAConfig(r=4, target_modules=list(GPTQ_TARGETS), safety_rank=6)
    with pytest.raises(UnsupportedLayerError, match=r"q_proj: this TorchLinear .*packed.*16 bit"):
        calibrate(gptq_model(), given, [batch()], progress=False)
