"""What only a GPU can show: the compiled kernels' results, their errors beside bitsandbytes', CUDA graphs, and writes
out of bounds.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from peft_safety import ops
from peft_safety.ops import QuantBundle, dispatch, reference
from peft_safety.registry.one_input import SKINNY_ROWS
from tests.ops.helpers import EPS, writes_out_of_bounds

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SHAPES = [(4096, 4096), (70, 192), (1, 64), (11008, 4096), (129, 4160)]
HALF = [torch.bfloat16, torch.float16]


def on_gpu(
    n: int, k: int, nested: bool, dtype: torch.dtype = torch.bfloat16, blocksize: int = 64
) -> tuple[QuantBundle, Tensor, Any]:
    from bitsandbytes.functional import quantize_4bit

    torch.manual_seed(0)
    weight = (torch.randn(n, k, device="cuda") * torch.rand(n, 1, device="cuda")).to(dtype)
    packed, state = quantize_4bit(weight, blocksize=blocksize, quant_type="nf4", compress_statistics=nested)
    return ops.require(ops.from_quant_state(packed, state)), packed, state


@pytest.fixture(autouse=True)
def _served_by_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    name, reason = ops.backend_for(torch.empty(1, device="cuda"))
    if name != "triton":
        pytest.skip(reason)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_dequantized_to_the_last_bit_as_bitsandbytes_does_it(n: int, k: int, dtype: torch.dtype, nested: bool) -> None:
    from bitsandbytes.functional import dequantize_4bit

    for blocksize in (64, 128) if k % 128 == 0 else (64,):
        q, packed, state = on_gpu(n, k, nested, dtype, blocksize)
        assert torch.equal(ops.nf4_dequant(q, dtype), dequantize_4bit(packed, state))


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("rows", [1, 64, 4096])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_errors_beside_bitsandbytes(dtype: torch.dtype, rows: int, nested: bool) -> None:
    """With few rows theirs may leave the weight unrounded, and rounding adds as much again as the result's own."""
    import bitsandbytes as bnb

    q, packed, state = on_gpu(4096, 4096, nested, dtype)
    x = torch.randn(rows, 4096, device="cuda", dtype=dtype)
    nothing = torch.zeros(rows, 16, device="cuda"), torch.zeros(4096, 16, device="cuda")
    exact = x.double() @ reference.unrounded(q).double().mT
    slack = 1.1 if rows > SKINNY_ROWS else 1.1 * 2**0.5
    theirs = (bnb.matmul_4bit(x, packed.t(), quant_state=state).double() - exact).norm()
    assert float((ops.nf4_lora(x, q, *nothing, 1.0).double() - exact).norm()) <= slack * float(theirs)


@pytest.mark.parametrize("rows", [4, 200])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_forward_and_backward_against_fp64(dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    q, _, _ = on_gpu(320, 512, True, dtype)
    x = torch.randn(rows, 512, device="cuda", dtype=dtype, requires_grad=True)
    a = (torch.randn(16, 512, device="cuda") / 512**0.5).requires_grad_()
    bp = (torch.randn(320, 16, device="cuda") / 4).requires_grad_()
    dy = torch.randn(rows, 320, device="cuda", dtype=dtype)
    y = ops.nf4_lora(x, q, ops.lora_z(x, a), bp, 0.5)
    twins = [t.detach().double().requires_grad_() for t in (x, a, bp)]
    wanted = twins[0] @ reference.unrounded(q).double().mT + 0.5 * (twins[0] @ twins[1].mT) @ twins[2].mT
    pairs = [
        (y, wanted),
        *zip(torch.autograd.grad(y, (x, a, bp), dy), torch.autograd.grad(wanted, twins, dy.double()), strict=True),
    ]
    for got, want in pairs:
        error, largest = (float(t.detach().abs().max()) for t in (got.double() - want, want))
        assert error <= 16 * EPS[dtype] * largest


@pytest.mark.parametrize("factor", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_the_product_with_a_has_the_precision_of_a(
    dtype: torch.dtype, factor: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sum of k fp32 terms, each addition rounded: its error grows like sqrt(k)."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    for rows, k, r in ((1, 4096, 16), (4096, 4096, 16), (333, 192, 48), (64, 4160, 70)):
        x = torch.randn(rows, k, device="cuda").to(dtype)
        a = (torch.randn(r, k, device="cuda") / k**0.5).to(factor)
        z, wanted = ops.lora_z(x, a), x.double() @ a.double().mT
        slack = max(16.0, k**0.5 / 2) * EPS[z.dtype]
        assert float((z.double() - wanted).abs().max()) <= slack * float(wanted.abs().max())


@pytest.mark.parametrize("rows", [1, 64])
def test_a_cuda_graph_holds_it(rows: int) -> None:
    q, _, _ = on_gpu(1024, 2048, True)
    a, bp = torch.randn(16, 2048, device="cuda").bfloat16(), torch.randn(1024, 16, device="cuda").bfloat16()
    x = torch.randn(rows, 2048, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        ops.nf4_lora(x, q, ops.lora_z(x, a), bp, 0.5)  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = ops.nf4_lora(x, q, ops.lora_z(x, a), bp, 0.5)
        for _ in range(2):
            x.copy_(torch.randn_like(x))
            graph.replay()
            assert torch.equal(y, ops.nf4_lora(x, q, ops.lora_z(x, a), bp, 0.5))


def test_the_same_bits_every_time() -> None:
    q, _, _ = on_gpu(1000, 4096, True)
    a, bp = torch.randn(16, 4096, device="cuda").bfloat16(), torch.randn(1000, 16, device="cuda").bfloat16()
    x = torch.randn(3, 4096, device="cuda", dtype=torch.bfloat16)
    first = ops.nf4_lora(x, q, ops.lora_z(x, a), bp, 0.5)
    assert all(torch.equal(first, ops.nf4_lora(x, q, ops.lora_z(x, a), bp, 0.5)) for _ in range(20))


def test_nothing_is_written_beside_the_result() -> None:
    assert writes_out_of_bounds(on_gpu(70, 192, True)[0]) == []


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_the_current_one() -> None:
    q, _, _ = on_gpu(64, 128, True)
    moved = QuantBundle(*(part.to("cuda:1") if isinstance(part, Tensor) else part for part in q))
    assert torch.equal(ops.nf4_dequant(moved, torch.bfloat16).to("cuda:0"), ops.nf4_dequant(q, torch.bfloat16))
