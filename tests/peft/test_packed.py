"""Every form on every quantized layer class of PEFT, most of whose weights this package cannot read. PEFT's own code
runs; what multiplies with the packed weights, which is not installed here, is a stand-in.
"""

import importlib
import importlib.util
import sys
import types

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners import lora
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn import functional as F

from peft_safety import (
    GuardSpaceConfig,
    OrthoSafetyPatchConfig,
    SaLoRAConfig,
    assert_protected,
    calibrate,
    explain_dispatch,
    export_lora,
    merge_quantized,
    verify,
)
from peft_safety.core import base_weights as weights
from peft_safety.errors import LossyMergeError, PeftSafetyError, SubspaceError, UnsupportedLayerError
from peft_safety.layers.adapters import KINDS, PACKED_KINDS
from tests.peft import cells
from tests.peft.frozen_cells import assert_frozen, copies
from tests.peft.guard_cells import HARMFUL, TASK, batches, config, subspace
from tests.peft.test_guardspace import BLIND
from tests.tiny import tiny_tokenizer

LEAK = 1e-6


class Packed(nn.Module):
    """As the layers of GPTQ, AWQ and HQQ are: no nn.Linear, integers with scales, half-precision inputs or fp32."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scales = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("qweight", (linear.weight.detach() / scales).round().to(torch.int8).T.contiguous())
        self.register_buffer("scales", scales.half())

    def forward(self, x):
        if x.dtype not in (torch.float16, torch.float32):
            raise TypeError(x.dtype)
        return F.linear(x, (self.qweight.T.float() * self.scales.float()).to(x.dtype))


class Hidden(nn.Parameter):
    """A quantized tensor, as torchao's are."""


def peft_class(module, name):
    """A layer class that PEFT defines only where a library is installed: its own source, run with stand-ins."""
    if hasattr(lora, name):
        return getattr(lora, name)
    fakes = {
        "hqq.core.quantize": {"HQQLinear": Packed},
        "eetq": {"EetqLinear": Packed},
        "torchao.quantization": {"Int4Tensor": int},
    }
    with pytest.MonkeyPatch.context() as patch:
        for full, content in fakes.items():
            fake = types.ModuleType(full)
            fake.__dict__.update(content)
            patch.setitem(sys.modules, full, fake)
        utils = importlib.import_module("peft.import_utils")
        for check in ("is_hqq_available", "is_eetq_available", "is_inc_available"):
            patch.setattr(utils, check, lambda: True)
        source = importlib.util.find_spec(f"peft.tuners.lora.{module}").origin
        spec = importlib.util.spec_from_file_location(f"peft.tuners.lora._test_{module}", source)
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
    return getattr(loaded, name)


CLASSES = {
    "AqlmLoraLinear": "aqlm",
    "AwqLoraLinear": "awq",
    "EetqLoraLinear": "eetq",
    "GPTQLoraLinear": "gptq",
    "HqqLoraLinear": "hqq",
    "IncLoraLinear": "inc",
    "TorchaoLoraLinear": "torchao",
}
FAST = ("GPTQLoraLinear", "TorchaoLoraLinear")
SOME = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CLASSES]


def base_model(name, seed=0):
    """The tiny model with packed layers."""
    model = cells.base_model(seed=seed)
    for full, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and full != "lm_head":
            parent, _, child = full.rpartition(".")
            if name in ("TorchaoLoraLinear", "Linear"):
                layer.weight = Hidden(layer.weight.detach(), requires_grad=False)
            else:
                setattr(model.get_submodule(parent), child, Packed(layer))
    return model


def dispatched(config, name, monkeypatch):
    """The config, with PEFT's own way to name the class of a layer. torchao's looks at its library."""
    if name == "TorchaoLoraLinear":
        fake = types.ModuleType("torchao.quantization")
        fake.Int4Tensor = int
        monkeypatch.setitem(sys.modules, "torchao.quantization", fake)
    if name != "Linear":
        cls = peft_class(CLASSES[name], name)
        config._register_custom_module({nn.Linear if name == "TorchaoLoraLinear" else Packed: cls})
    return config


@pytest.mark.filterwarnings("ignore:.*instantiated without", "ignore:Unsupported layer type")
@pytest.mark.parametrize("name", [*CLASSES, "Linear"])
def test_a_frozen_a_on_a_layer_that_peft_knows(name, monkeypatch, tmp_path):
    base = base_model(name)
    given = config("auto", train="B", task_data=batches(TASK), safety_rank=6)
    space = calibrate(base, given, HARMFUL, tokenizer=tiny_tokenizer(), progress=False)
    given.subspace = space
    model = get_peft_model(base, dispatched(given, name, monkeypatch))
    kinds = {type(module).__name__ for module in model.modules() if isinstance(module, LoraLayer)}
    assert kinds == {"LoraLinear" if name == "Linear" else name}
    before = copies(model)
    cells.train(model, cells.adamw, 30)
    assert_frozen(model, before)
    probes = {own: torch.randn(5, 6) @ space.bases[own]["in"].mT for own, _ in cells.layers_of(model)}
    for own, layer in cells.layers_of(model):
        with torch.no_grad():
            inputs = probes[own], torch.randn(5, layer.in_features)
            seen, other = (layer(x) - layer.get_base_layer()(x) for x in inputs)
            size = layer.lora_B["default"].weight.norm() * probes[own].norm()
        assert float(seen.norm() / size) <= BLIND
        assert float(other.norm()) > 1e-3, "elsewhere it learns"
    model.eval().save_pretrained(tmp_path / "adapter")
    found = verify(tmp_path / "adapter", base_model(name), space)
    assert (found.blindness_checked, found.base_checked, found.worst_leak <= LEAK) == (True, True, True)
    stored = dispatched(PeftConfig.from_pretrained(tmp_path / "adapter"), name, monkeypatch)
    loaded = PeftModel.from_pretrained(base_model(name), tmp_path / "adapter", config=stored).eval()
    assert_protected(loaded)
    cells.assert_same_function(cells.logits(loaded), cells.logits(model))
    monkeypatch.setenv("PEFT_SAFETY_FUSED", "1")
    assert {row.reason for row in explain_dispatch(model)} == {"a packed base weight"}
    with pytest.raises(LossyMergeError, match="cannot be merged into"):
        model.merge_and_unload()
    with pytest.raises(UnsupportedLayerError, match="is not supported"):
        merge_quantized(model, verbose=False)
    export_lora(model, tmp_path / "plain")
    plain = dispatched(LoraConfig.from_pretrained(tmp_path / "plain"), name, monkeypatch)
    exported = PeftModel.from_pretrained(base_model(name), tmp_path / "plain", config=plain).eval()
    cells.assert_same_function(cells.logits(exported), cells.logits(model))


def test_a_subspace_of_the_dense_model_fits_its_packed_form_and_no_other(monkeypatch):
    space = subspace(cells.base_model())
    for own, layer in base_model("GPTQLoraLinear").named_modules():
        if own in space.bases:
            distance = weights.distance(weights.fingerprint(layer, own), space.fingerprints[own])
            assert distance < 0.02, "8 bits"
    given = dispatched(config(space, train="B", a_init="random"), "GPTQLoraLinear", monkeypatch)
    same = base_model("GPTQLoraLinear")
    same.lm_head = nn.Linear(32, 2)  # the only dense layer is narrower than r
    get_peft_model(same, given)
    other = base_model("GPTQLoraLinear", seed=1)
    with pytest.raises(SubspaceError, match="other base weights"):
        get_peft_model(other, given)
    assert not any(isinstance(module, LoraLayer) for module in other.modules())


@pytest.mark.filterwarnings("ignore:.*instantiated without", "ignore:Unsupported layer type")
@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("train", ["A", "window"])
def test_the_forms_that_project_work_there_too(train, name, monkeypatch, tmp_path):
    space = subspace(base_model(name))
    given = config(space, train=train, a_init="random" if train == "window" else "task")
    model = get_peft_model(base_model(name), dispatched(given, name, monkeypatch))
    cells.train(model, cells.adamw, 20)
    model.eval().save_pretrained(tmp_path)
    found = verify(tmp_path, base_model(name), space if train == "window" else None)
    assert (found.base_checked, found.blindness_checked, found.worst_leak <= LEAK) == (True, True, True)
    stored = dispatched(PeftConfig.from_pretrained(tmp_path), name, monkeypatch)
    loaded = PeftModel.from_pretrained(base_model(name), tmp_path, config=stored).eval()
    assert_protected(loaded)
    cells.assert_same_function(cells.logits(loaded), cells.logits(model))
    with pytest.raises(LossyMergeError, match="cannot be merged into"):
        model.merge_adapter()


@pytest.mark.parametrize(
    "given",
    [
        lambda: config(subspace(cells.base_model()), init="guardspace"),
        lambda: SaLoRAConfig(r=4, target_modules=["q_proj"], safety_rank=4),
        lambda: OrthoSafetyPatchConfig(
            r=4, target_modules=["q_proj"], subspace=subspace(cells.base_model()), mode="soft"
        ),
    ],
    ids=["a residual", "a basis of outputs", "a penalty"],
)
@pytest.mark.parametrize("name", SOME)
def test_what_needs_the_weight_is_refused_there(name, given, monkeypatch):
    monkeypatch.setattr("peft_safety.methods.base.tokenizer_for", lambda *_: tiny_tokenizer())
    base = base_model(name)
    with pytest.raises(UnsupportedLayerError, match=r"q_proj: this \w+ .*(packed|is a Hidden).*16 bit"):
        get_peft_model(base, dispatched(given(), name, monkeypatch))
    assert not any(isinstance(module, LoraLayer) for module in base.modules())


def test_a_class_that_nobody_has_looked_at_is_refused():
    class Unknown(lora.GPTQLoraLinear):
        pass

    given = config(subspace(cells.base_model()), train="B", a_init="random")
    given._register_custom_module({Packed: Unknown})
    with pytest.raises(PeftSafetyError, match=r"q_proj: .* not supported"):
        get_peft_model(base_model("GPTQLoraLinear"), given)


def test_every_layer_class_of_this_peft_is_known():
    refused = {"Embedding", "_ConvNd", "Conv1d", "Conv2d", "Conv3d", "MultiheadAttention", "ParamWrapper"}
    refused |= {"LoraParallelLinear", "TeLinear"}  # Megatron shards the factors; its layers normalize their inputs

    def below(kind):
        return {kind, *(deeper for child in kind.__subclasses__() for deeper in below(child))}

    theirs = {k.__name__ for k in below(LoraLayer) if k.__module__.startswith("peft.tuners.lora.")}
    assert theirs - {"LoraLayer"} <= refused | set(KINDS) | set(PACKED_KINDS)


def test_the_default_of_guardspace_on_packed_layers_calibrates_by_itself(monkeypatch):
    monkeypatch.setattr("peft_safety.methods.base.tokenizer_for", lambda *_: tiny_tokenizer())
    given = GuardSpaceConfig(r=2, target_modules=["q_proj"], task_data=batches(TASK), safety_rank=4)
    model = get_peft_model(base_model("AwqLoraLinear"), dispatched(given, "AwqLoraLinear", monkeypatch))
    assert_protected(model)
