"""Projections and streamed products: against dense fp64, derivatives, and every schema by torch's own check."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from peft_safety import ops, projection
from peft_safety.errors import OperationError
from peft_safety.ops import schemas, streaming
from tests.ops.helpers import case, quantised

OPS: Any = torch.ops.peft_safety


def basis(d: int, k: int, *groups: int) -> Tensor:
    return torch.linalg.qr(torch.randn(*groups, d, k, dtype=torch.float64)).Q


@pytest.mark.parametrize("side", ["out", "in"])
def test_project_out(side: projection.Side) -> None:
    u = basis(20, 3).float()
    w = torch.randn(20, 4) if side == "out" else torch.randn(4, 20)
    assert torch.equal(ops.project_out(u, w, side), projection.project_out(u, w, side))
    assert projection.leak(u, ops.project_out(u, w, side), side) < 1e-6
    half = ops.project_out(u, w.bfloat16(), side)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, projection.project_out(u, w.bfloat16().float(), side).bfloat16())


def test_project_out_grouped_is_project_out_for_each() -> None:
    u, w = basis(24, 3, 5).float(), torch.randn(5, 24, 4)
    for found, one, factor in zip(ops.project_out_grouped(u, w), u, w, strict=True):
        torch.testing.assert_close(found, ops.project_out(one, factor), rtol=1e-6, atol=1e-6)


def test_projections_are_differentiated_by_themselves() -> None:
    u = basis(6, 2)
    assert torch.autograd.gradcheck(lambda w: ops.project_out(u, w, "out"), torch.randn(6, 3, dtype=torch.float64, requires_grad=True))
    assert torch.autograd.gradcheck(lambda w: ops.project_out(u, w, "in"), torch.randn(3, 6, dtype=torch.float64, requires_grad=True))
    assert torch.autograd.gradgradcheck(lambda w: ops.project_out(u, w, "out").pow(2), torch.randn(6, 3, dtype=torch.float64, requires_grad=True))
    grouped = basis(6, 2, 4)
    assert torch.autograd.gradcheck(lambda w: ops.project_out_grouped(grouped, w), torch.randn(4, 6, 3, dtype=torch.float64, requires_grad=True))


def test_autocast_does_not_lower_a_projection() -> None:
    u, w = basis(64, 8).float(), torch.randn(64, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert projection.leak(u, ops.project_out(u, w)) < 1e-6
        assert projection.leak(u, ops.project_out_grouped(u[None], w[None])[0]) < 1e-6


def test_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    wa, wb, b, z = torch.randn(37, 64), torch.randn(37, 64), torch.randn(37, 3), torch.randn(64, 3)
    v = wa.double() - wb.double()
    for limit in (streaming.BLOCK_BYTES, 64 * 4 * 5):  # one block, and blocks of five rows with a rest of two
        monkeypatch.setattr(streaming, "BLOCK_BYTES", limit)
        found, energy = ops.diff_tmul(wa, wb, b)
        torch.testing.assert_close(found.double(), v.mT @ b.double(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(energy, v.square().sum(), rtol=1e-6, atol=0)
        torch.testing.assert_close(ops.diff_mul(wa, wb, z).double(), v @ z.double(), rtol=1e-5, atol=1e-5)
    exact, _ = ops.diff_tmul(wa.double(), wb.double(), b.double())
    torch.testing.assert_close(exact, v.mT @ b.double())
    half, _ = ops.diff_tmul(wa.bfloat16(), wb.bfloat16(), b)  # subtracted in fp32
    torch.testing.assert_close(half, (wa.bfloat16().float() - wb.bfloat16().float()).mT @ b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_nf4_products(nested: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "BLOCK_BYTES", 128 * 4 * 7)
    first, second = case(33, 128, 3, nested=nested), case(33, 128, 3, nested=nested, seed=1)
    b, z = torch.randn(33, 5), torch.randn(128, 5)
    torch.testing.assert_close(ops.nf4_tmul(first.q, b).double(), first.dense.mT @ b.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ops.nf4_mul(first.q, z).double(), first.dense @ z.double(), rtol=1e-5, atol=1e-5)
    v = first.dense - second.dense
    found, energy = ops.nf4_diff_tmul(first.q, second.q, b)
    torch.testing.assert_close(found.double(), v.mT @ b.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(energy, v.square().sum(), rtol=1e-6, atol=0)
    torch.testing.assert_close(ops.nf4_diff_mul(first.q, second.q, z).double(), v @ z.double(), rtol=1e-5, atol=1e-5)


def test_the_subspace_of_an_nf4_weight_without_its_dense_form() -> None:
    c = case(96, 256, 2, nested=True)
    moment = torch.randn(256, 300)
    for s in (None, moment @ moment.mT / 300):
        u, _ = projection.top_eigenvectors(lambda x, s=s: ops.nf4_gram_mul(c.q, x, s), 96, 24, like=torch.empty(0))
        wanted, _ = projection.top_left_singular(c.dense, None if s is None else s.double(), 8, oversampling=16)
        assert float(projection.principal_cosines(u[:, :8], wanted).min()) > 0.999


def test_operands_that_do_not_fit() -> None:
    q = quantised(32, 64)
    for call in (
        lambda: ops.nf4_mul(q, torch.zeros(63, 2)),
        lambda: ops.nf4_tmul(q, torch.zeros(32)),
        lambda: ops.diff_mul(torch.zeros(3, 4), torch.zeros(4, 3), torch.zeros(4, 1)),
        lambda: ops.diff_tmul(torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(4, 1)),
        lambda: ops.nf4_diff_mul(q, quantised(32, 128), torch.zeros(64, 1)),
        lambda: ops.nf4_dequant(q, torch.float64),
        lambda: ops.project_out(torch.zeros(4, 2), torch.zeros(5, 2)),
        lambda: ops.project_out_grouped(torch.zeros(2, 4, 2), torch.zeros(3, 4, 2)),
    ):
        with pytest.raises(OperationError, match=r"\(|float64"):
            call()


def arguments(nested: bool) -> dict[str, list[tuple[Any, ...]]]:
    """Arguments for every op, with gradients where it has any."""
    c = case(16, 64, 3, nested=nested)

    def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
        return [torch.randn(*shape, requires_grad=True) for shape in shapes]

    a, bp = leaves((3, 64), (16, 3))
    lora, backward = [], []
    for rows, merged, split in ((2, False, False), (70, True, False), (70, False, False), (70, False, True)):
        x, xa = leaves((rows, 64), (rows, 64))
        lora.append((x, xa if split else None, *c.q, a, bp, 0.5, merged))
        z = torch.randn(0 if merged else rows, 3)
        backward.append((torch.randn(rows, 16), xa.detach(), z, *c.q, a.detach(), bp.detach(), 0.5, merged, split, [True, split, True, True]))
        backward.append((torch.randn(rows, 16), xa.detach(), z, *c.q, a.detach(), bp.detach(), 0.5, merged, split, [False, False, False, True]))
    blocks = torch.randn(16, 2), torch.randn(64, 2)
    weights = torch.randn(16, 64), torch.randn(16, 64)
    return {
        "nf4_dequant": [(*c.q, torch.bfloat16)],
        "nf4_merged": [(*c.q, a, bp, 0.5, torch.float32)],
        "nf4_lora": lora,
        "nf4_lora_backward": backward,
        "nf4_mul": [(*c.q, blocks[1])],
        "nf4_tmul": [(*c.q, blocks[0])],
        "nf4_diff_mul": [(*c.q, *c.q, blocks[1])],
        "nf4_diff_tmul": [(*c.q, *c.q, blocks[0])],
        "diff_mul": [(*weights, blocks[1])],
        "diff_tmul": [(*weights, blocks[0])],
        "project_out": [(basis(16, 2).float(), bp, True), (basis(64, 2).float(), a, False)],
        "project_out_grouped": [(basis(16, 2, 3).float(), *leaves((3, 16, 4)))],
    }


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("name", sorted(schemas.SCHEMAS))
def test_opcheck(name: str, nested: bool) -> None:
    for args in arguments(nested)[name]:
        torch.library.opcheck(getattr(OPS, name).default, args)
