"""Which weights become a bundle, and what is said of the others."""

from __future__ import annotations

import copy

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from peft_safety.errors import OperationError
from peft_safety.ops import from_linear4bit, from_quant_state, nf4_dequant, require
from peft_safety.ops.quant import BLOCK_SIZES, QuantBundle


def linear4bit(n: int = 32, k: int = 64, **options: object) -> bnb.nn.Linear4bit:
    layer = bnb.nn.Linear4bit(k, n, bias=False, compute_dtype=torch.float32, **{"quant_type": "nf4", **options})
    layer.weight = bnb.nn.Params4bit(
        torch.randn(n, k), requires_grad=False, module=layer, **{"quant_type": "nf4", **options}
    )
    return layer.to("cpu")


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_a_layer_is_shared_not_copied(nested: bool) -> None:
    layer = linear4bit(compress_statistics=nested)
    q = require(from_linear4bit(layer))
    assert q.wq.data_ptr() == layer.weight.data_ptr()
    assert q.absmax is layer.weight.quant_state.absmax
    assert q.nested == nested
    assert (q.n, q.k, q.blocksize) == (32, 64, 64)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("blocksize", BLOCK_SIZES)
def test_dequantized_as_bitsandbytes_does_it(blocksize: int, nested: bool) -> None:
    for n, dtype in ((7, torch.float32), (70, torch.bfloat16), (3, torch.float16)):
        weight = torch.randn(n, 2 * blocksize) * torch.rand(n, 1)
        packed, state = quantize_4bit(weight, blocksize=blocksize, quant_type="nf4", compress_statistics=nested)
        q = require(from_quant_state(packed, state))
        for wanted in (dtype, torch.float32):
            state.dtype = wanted
            with torch.compiler.set_stance(
                "force_eager"
            ):  # bitsandbytes compiles what it does with large blocks on some CPUs, which takes seconds
                assert torch.equal(nf4_dequant(q, wanted), dequantize_4bit(packed, state))


def reason(layer: torch.nn.Module) -> str:
    found = from_linear4bit(layer)
    assert isinstance(found, str)
    return found


def test_reasons() -> None:
    torch.manual_seed(0)
    assert "'fp4'" in reason(linear4bit(quant_type="fp4"))
    assert "quant_storage torch.bfloat16" in reason(linear4bit(quant_storage=torch.bfloat16))
    assert "multiple of the block size" in reason(linear4bit(k=96))
    assert "no 4-bit quantization state" in reason(torch.nn.Linear(4, 4))
    assert "8-bit" in reason(bnb.nn.Linear8bitLt(4, 4))
    layer = linear4bit()
    layer.weight.quant_state.packing_format_for_cpu = True
    assert "AVX512" in reason(layer)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"blocksize": 48}, "block size of 48"),
        ({"blocksize": 16}, "block size of 16"),
        ({"shape": torch.Size([32, 64, 1])}, "not a matrix"),
        ({"shape": torch.Size([16, 64])}, "packed bytes"),
        ({"absmax": torch.ones(32, dtype=torch.bfloat16)}, "scales of torch.bfloat16"),
        ({"absmax": torch.ones(31)}, "31 scales"),
    ],
)
def test_damaged_states_are_refused(change: dict[str, object], said: str) -> None:
    packed, state = quantize_4bit(torch.randn(32, 64), quant_type="nf4", compress_statistics=False, blocksize=64)
    for name, value in change.items():
        setattr(state, name, value)
    found = from_quant_state(packed, state)
    assert isinstance(found, str)
    assert said in found
    with pytest.raises(OperationError, match="some module: "):
        require(found, "some module")


def test_damaged_nested_states_are_refused() -> None:
    packed, state = quantize_4bit(torch.randn(32, 64), quant_type="nf4", compress_statistics=True, blocksize=64)
    assert isinstance(from_quant_state(packed, state), QuantBundle)
    for name, value, said in (
        ("blocksize", 100, "blocks of 100"),
        ("code", torch.ones(16), "a code of"),
        ("absmax", torch.ones(9), "9 scales"),
    ):
        broken = copy.copy(state)
        broken.state2 = copy.copy(state.state2)
        setattr(broken.state2, name, value)
        found = from_quant_state(packed, broken)
        assert isinstance(found, str)
        assert said in found
