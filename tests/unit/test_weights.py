"""Base weights as the package reads them: dense, dequantized, and not touched by reading or calibrating."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_safety import SafetySubspace
from peft_safety.core import base_weights as weights
from peft_safety.errors import UnsupportedLayerError

bnb = pytest.importorskip("bitsandbytes")


def nf4(weight: torch.Tensor, nested: bool) -> nn.Module:
    layer = bnb.nn.Linear4bit(
        weight.shape[1],
        weight.shape[0],
        bias=False,
        compute_dtype=torch.float32,
        compress_statistics=nested,
        quant_type="nf4",
    )
    layer.weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, compress_statistics=nested, quant_type="nf4")
    return layer.to("cpu")


def random_weight(m: int = 96, n: int = 128) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(0))


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("nested", [False, True])
def test_a_4bit_weight_reads_the_same_before_and_after_an_eval_forward(nested):
    layer = nf4(random_weight(), nested)
    before = weights.dense_weight(layer)
    assert 0.05 < distance(before, random_weight()) < 0.15  # what NF4 does to Gaussian weights
    with torch.no_grad():
        layer.eval()(torch.randn(2, 128))  # repacks the weight in place on CPUs with AVX512-BF16
    assert distance(weights.dense_weight(layer), before) < 0.005


@pytest.mark.parametrize("nested", [False, True])
def test_calibrating_leaves_4bit_weights_bit_for_bit_and_their_gradients_as_they_were(nested):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(50, 128)
            self.proj = nf4(random_weight(), nested)

        def forward(self, input_ids, attention_mask=None, use_cache=False):
            return self.proj(self.embed(input_ids))

    torch.manual_seed(0)
    model = Model().eval()
    data, state = model.proj.weight.data.clone(), model.proj.weight.quant_state
    scales = state.absmax.clone()
    x = torch.randn(3, 128, requires_grad=True)
    (gradient,) = torch.autograd.grad(model.proj(x).sum(), x)
    ids = torch.randint(0, 50, (4, 16), generator=torch.Generator().manual_seed(1))
    subspace = SafetySubspace.from_activations(
        model, [{"input_ids": ids, "labels": ids}], rank=8, target_modules=["proj"], progress=False
    )
    assert torch.equal(model.proj.weight.data, data)
    assert torch.equal(model.proj.weight.quant_state.absmax, scales)
    assert torch.equal(torch.autograd.grad(model.proj(x).sum(), x)[0], gradient)
    exact = torch.linalg.svd(weights.dense_weight(model.proj) @ model.embed(ids).reshape(-1, 128).mT.detach())
    assert float(torch.linalg.svdvals(subspace.bases["proj"]["out"].mT @ exact.U[:, :8]).min()) > 0.999


def test_an_8bit_weight_is_dequantized_row_by_row():
    layer = bnb.nn.Linear8bitLt(128, 96, bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(random_weight(), requires_grad=False, has_fp16_weights=False)
    assert distance(weights.dense_weight(layer.to("cpu")), random_weight()) < 0.02


def test_conv1d_is_read_as_out_by_in():
    layer = Conv1D(6, 4)  # transformers: Conv1D(out, in), weight stored (in, out)
    assert weights.shape(layer) == (6, 4)
    assert torch.equal(weights.dense_weight(layer), layer.weight.detach().T)
    assert weights.fingerprint(layer, "conv").shape == (weights.SAMPLES,)


@pytest.mark.parametrize(
    "layer", [nn.Embedding(4, 4, max_norm=1.0), nn.Linear(4, 4, device="meta"), nn.Conv2d(2, 2, 3, dilation=2)]
)
def test_what_cannot_be_read_is_refused_by_name(layer):
    with pytest.raises(UnsupportedLayerError, match=r"model\.x"):
        weights.dense_weight(layer, "model.x")
