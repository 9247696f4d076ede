"""Weights in one byte, and subclasses of nn.Linear: read for what they compute with, or refused by name before
anything is estimated.
"""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers.models.falcon.modeling_falcon import FalconLinear

from peft_safety import GuardSpaceConfig, SafetySubspace, SaLoRAConfig, merge_quantized
from peft_safety.core import base_weights as weights
from peft_safety.core.checkpoints import open_weights
from peft_safety.errors import LossyMergeError, PeftSafetyError, UnsupportedLayerError
from tests.peft.cells import random_subspace
from tests.tiny import tiny_llama

M, N = 40, 24


def reference() -> torch.Tensor:
    """Rows and columns of very different size: scales that are dropped, or put in the wrong place, show."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-2, 2, M)[:, None] * torch.logspace(-1, 1, N)
    return torch.randn(M, N, generator=generator) * sizes


def fp8(kind: str, weight: torch.Tensor | None = None) -> nn.Linear:
    """A layer of transformers' that stands for `weight`, as its own quantizer would fill it."""
    w = reference() if weight is None else weight
    rows, columns = w.shape
    if kind in ("block", "tensor"):
        module = pytest.importorskip("transformers.integrations.finegrained_fp8")
        height, width = (16, 16) if kind == "block" else (rows, columns)
        padded = F.pad(w, (0, -columns % width, 0, -rows % height))
        tiles = padded.view(padded.shape[0] // height, height, padded.shape[1] // width, width)
        scale = tiles.abs().amax(dim=(1, 3)) / 448
        stored = (tiles / scale[:, None, :, None]).view_as(padded)[:rows, :columns]
        layer = module.FP8Linear(columns, rows, block_size=(16, 16) if kind == "block" else None)
        layer.weight_scale_inv = nn.Parameter(scale if kind == "block" else scale.view(()), requires_grad=False)
    else:
        name, cls = {
            "rows": ("fbgemm_fp8", "FbgemmFp8Linear"),
            "compressed": ("compressed_tensors", "CompressedTensorsFP8Linear"),
        }[kind]
        module = pytest.importorskip(f"transformers.integrations.{name}")
        if not hasattr(module, cls):
            pytest.skip(f"this transformers has no {cls}")
        layer = getattr(module, cls)(columns, rows, False)
        scale = w.abs().amax(dim=1, keepdim=True) / 448
        stored = w / scale
        layer.weight_scale = nn.Parameter(scale if kind == "rows" else scale.mT.contiguous(), requires_grad=False)
    layer.weight = nn.Parameter(stored.to(torch.float8_e4m3fn), requires_grad=False)
    return layer


def holding(layer: nn.Module) -> nn.Module:
    model = nn.Module()
    model.q_proj = layer
    return model


KINDS = ("block", "tensor", "rows", "compressed")


@pytest.mark.parametrize("kind", KINDS)
def test_fp8_is_read_with_its_scales(kind):
    layer = fp8(kind)
    rows = (weights.dense_weight(layer) - reference()).norm(dim=1) / reference().norm(dim=1)
    assert float(rows.max()) < (
        2.0 if kind == "tensor" else 0.05
    )  # one scale for all loses the smallest rows, and nothing else
    assert float(rows[-M // 2 :].max()) < 0.05
    assert weights.quantization(layer) == "fp8"
    with open_weights(holding(layer)).open("q_proj") as matrix:
        assert torch.equal(matrix.block(3, 9), weights.dense_weight(layer)[:, 3:9])


@pytest.mark.parametrize("kind", KINDS)
def test_weight_bases_of_fp8_are_those_of_the_weight(kind):
    space = SafetySubspace.from_weights(
        holding(fp8(kind)), rank=4, sides=("out",), target_modules=["q_proj"], progress=False
    )
    true = torch.linalg.svd(reference()).U[:, :4]
    assert float((space.bases["q_proj"]["out"].mT @ true).square().sum()) / 4 > 0.95
    assert space.provenance["precision"] == "fp8"


@pytest.mark.parametrize("scale", [None, torch.ones(2, 2), torch.ones(M), torch.ones(N, M)])
def test_fp8_whose_scales_do_not_fit_is_refused(scale):
    layer = fp8("block")
    layer.weight_scale_inv = None if scale is None else nn.Parameter(scale)
    with pytest.raises(UnsupportedLayerError, match=r"model\.x: FP8Linear .*scales.*16 bit"):
        weights.dense_weight(layer, "model.x")


def test_an_adapter_on_fp8_merges_into_16_bit_and_not_into_fp8():
    base = tiny_llama()
    expected = {}
    for layer in base.model.layers:
        weight = layer.self_attn.q_proj.weight.detach().clone()
        layer.self_attn.q_proj = fp8("block", weight)
    space = random_subspace(base, ["q_proj"])
    model = get_peft_model(base, SaLoRAConfig(r=4, subspace=space, target_modules=["q_proj"]))
    for name, layer in model.get_base_model().named_modules():
        if name.endswith("q_proj"):
            layer.lora_B["default"].weight.data.normal_(std=0.01)
            expected[name] = weights.dense_weight(layer.get_base_layer()) + layer.get_delta_weight("default").detach()
    with pytest.raises(LossyMergeError, match="fp8"):
        model.merge_and_unload()
    merged = merge_quantized(model, dtype=torch.float32, verbose=False).model
    for name, weight in expected.items():
        assert type(merged.get_submodule(name)) is nn.Linear
        torch.testing.assert_close(merged.get_submodule(name).weight, weight, rtol=1e-5, atol=1e-6)


class Scaled(nn.Linear):
    """Dense to look at; its forward multiplies what it holds."""

    def __init__(self) -> None:
        super().__init__(N, M)
        self.weight_scale = nn.Parameter(torch.full((M, 1), 3.0))

    def forward(self, input):
        return F.linear(input, self.weight * self.weight_scale, self.bias)


class Tuple(nn.Linear):
    def forward(self, input):
        return super().forward(input), input


class Hidden(nn.Parameter):
    """A quantized tensor, as torchao's and quanto's are: what it holds is not what it stands for."""


class Packed(nn.Module):
    """As the layers of GPTQ, AWQ and HQQ are: no nn.Linear, no weight."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = N, M
        self.register_buffer("qweight", torch.zeros(N // 8, M, dtype=torch.int32))


def linear(weight: torch.Tensor, **beside: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(N, M)
    layer.weight = weight if isinstance(weight, Hidden) else nn.Parameter(weight, requires_grad=False)
    for name, value in beside.items():
        layer.register_buffer(name, value)
    return layer


ODD = {
    "fp8_without_scales": lambda: linear(torch.zeros(M, N).to(torch.float8_e4m3fn)),
    "fp8_with_scales_of_unknown_meaning": lambda: linear(
        torch.zeros(M, N).to(torch.float8_e5m2), weight_scale=torch.ones(M, 1)
    ),
    "int8_with_scales": lambda: linear(torch.zeros(M, N, dtype=torch.int8), scales=torch.ones(M, 1)),
    "packed_in_uint8": lambda: linear(torch.zeros(M, N // 2, dtype=torch.uint8), weight_scale=torch.ones(M, 1)),
    "tensor_subclass": lambda: linear(Hidden(torch.zeros(M, N))),
    "scaled_in_the_forward": Scaled,
    "forward_gives_more": lambda: Tuple(N, M),
    "no_linear": Packed,
}


@pytest.mark.parametrize("name", ODD)
def test_what_is_not_the_weight_is_refused_by_name_and_kind(name):
    model = holding(ODD[name]())
    for read in (
        lambda: weights.dense_weight(model.q_proj, "q_proj"),
        lambda: SafetySubspace.from_weights(model, rank=4, target_modules=["q_proj"], progress=False),
    ):
        with pytest.raises(
            UnsupportedLayerError, match=rf"q_proj: this {type(model.q_proj).__name__} .*16 bit.*leave this layer out"
        ):
            read()


class Opaque(torch.Tensor):
    """A quantized tensor as torchao's are: it can be multiplied with, and nothing else."""

    @staticmethod
    def __new__(cls, weight: torch.Tensor) -> torch.Tensor:
        return torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype)

    def __init__(self, weight: torch.Tensor) -> None:
        self.scale = weight.abs().amax(dim=1, keepdim=True) / 127
        self.values = (weight / self.scale).round().to(torch.int8)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            return func(args[0], args[1].values.float() * args[1].scale, *args[2:])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"{func} of a quantized tensor")


@pytest.mark.parametrize("method", ["guardspace", "salora", "weights"])
def test_a_tensor_that_can_only_be_multiplied_with_is_used_so_or_refused_by_name(method):
    base, options = tiny_llama(), {"rank": 4, "target_modules": ["q_proj"], "progress": False}
    for layer in base.model.layers:
        weight = layer.self_attn.q_proj.weight.detach()
        layer.self_attn.q_proj.weight = nn.Parameter(Opaque(weight), requires_grad=False)
    ids = torch.randint(5, 200, (4, 32), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids}
    if method == "guardspace":  # which needs the layers' inputs only
        space = SafetySubspace.from_activations(base, [batch], method=method, **options)
        model = get_peft_model(base, GuardSpaceConfig(r=2, target_modules=["q_proj"], subspace=space))
        model(**batch).loss.backward()
        return
    estimate = {
        "salora": lambda: SafetySubspace.from_activations(base, [batch], method=method, **options),
        "weights": lambda: SafetySubspace.from_weights(base, **options),
    }
    named = r"layers\.0\.self_attn\.q_proj: .* is a Opaque\. Load the model in 16"
    with pytest.raises(UnsupportedLayerError, match=named):
        estimate[method]()


def test_an_instance_whose_forward_was_replaced_is_tried():
    layer = nn.Linear(N, M)
    layer.forward = lambda x: F.linear(x, layer.weight, layer.bias)  # as accelerate's hooks do
    assert torch.equal(weights.dense_weight(layer), layer.weight.detach())
    layer.forward = lambda x: F.linear(x, 2 * layer.weight, layer.bias)  # as compressed-tensors does
    with pytest.raises(UnsupportedLayerError, match="does not compute"):
        weights.dense_weight(layer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cls", [nn.Linear, FalconLinear, nn.modules.linear.NonDynamicallyQuantizableLinear])
def test_subclasses_that_compute_what_a_linear_layer_computes_are_dense(cls, dtype):
    layer = cls(N, M).to(dtype)
    assert torch.equal(weights.dense_weight(layer), layer.weight.detach().float())


def test_an_adapter_on_a_weight_that_cannot_be_read_is_refused_and_the_model_is_as_it_was():
    base = tiny_llama()
    space = random_subspace(base, ["q_proj"])
    layer = base.model.layers[1].self_attn.q_proj
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(PeftSafetyError, match=r"layers\.1\.self_attn\.q_proj: this Linear .*float8_e4m3fn"):
        get_peft_model(base, SaLoRAConfig(r=4, subspace=space, target_modules=["q_proj"]))
    assert base.model.layers[1].self_attn.q_proj is layer
