"""The projection of a factor as an op, operands that do not fit, and every schema by torch's own check."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from peft_safety import ops
from peft_safety.core import projection
from peft_safety.errors import OperationError
from peft_safety.ops import schemas
from tests.ops.helpers import case, quantized

OPS: Any = torch.ops.peft_safety


def basis(d: int, k: int) -> Tensor:
    return torch.linalg.qr(torch.randn(d, k, dtype=torch.float64)).Q


@pytest.mark.parametrize("side", ["out", "in"])
def test_project_out(side: projection.Side) -> None:
    u = basis(20, 3).float()
    w = torch.randn(20, 4) if side == "out" else torch.randn(4, 20)
    assert torch.equal(ops.project_out(u, w, side), projection.project_out(u, w, side))
    assert projection.leak(u, ops.project_out(u, w, side), side) < 1e-6
    half = ops.project_out(u, w.bfloat16(), side)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, projection.project_out(u, w.bfloat16().float(), side).bfloat16())
    wide = ops.project_out(u, w.double(), side)  # a factor wider than its basis keeps its digits
    torch.testing.assert_close(wide, projection.project_out(u.double(), w.double(), side), rtol=0, atol=1e-14)


def test_projections_are_differentiated_by_themselves() -> None:
    u = basis(6, 2)
    assert torch.autograd.gradcheck(
        lambda w: ops.project_out(u, w, "out"), torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    )
    assert torch.autograd.gradcheck(
        lambda w: ops.project_out(u, w, "in"), torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    )
    assert torch.autograd.gradgradcheck(
        lambda w: ops.project_out(u, w, "out").pow(2), torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    )


def test_autocast_does_not_lower_a_projection() -> None:
    u, w = basis(64, 8).float(), torch.randn(64, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert projection.leak(u, ops.project_out(u, w)) < 1e-6


def test_operands_that_do_not_fit() -> None:
    q = quantized(32, 64)
    for call in (
        lambda: ops.nf4_dequant(q, torch.float64),
        lambda: ops.project_out(torch.zeros(4, 2), torch.zeros(5, 2)),
        lambda: ops.project_out(torch.zeros(4, 2), torch.zeros(4, 5), "in"),
        lambda: ops.project_out(torch.zeros(4), torch.zeros(4, 5)),
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
        backward.append(
            (
                torch.randn(rows, 16),
                xa.detach(),
                z,
                *c.q,
                a.detach(),
                bp.detach(),
                0.5,
                merged,
                split,
                [True, split, True, True],
            )
        )
        backward.append(
            (
                torch.randn(rows, 16),
                xa.detach(),
                z,
                *c.q,
                a.detach(),
                bp.detach(),
                0.5,
                merged,
                split,
                [False, False, False, True],
            )
        )
    return {
        "nf4_dequant": [(*c.q, torch.bfloat16)],
        "nf4_merged": [(*c.q, a, bp, 0.5, torch.float32)],
        "nf4_lora": lora,
        "nf4_lora_backward": backward,
        "project_out": [(basis(16, 2).float(), bp, True), (basis(64, 2).float(), a, False)],
    }


SLOW = ("nf4_lora", "nf4_lora_backward")
"""Checked with quantized scales; with plain ones too in the nightly run."""


@pytest.mark.parametrize(
    ("name", "nested"),
    [
        pytest.param(
            name,
            nested,
            marks=[pytest.mark.slow] if name in SLOW and not nested else [],
            id=f"{name}-{'nested' if nested else 'plain'}",
        )
        for name in sorted(schemas.SCHEMAS)
        for nested in (False, True)
    ],
)
def test_opcheck(name: str, nested: bool) -> None:
    for args in arguments(nested)[name]:
        torch.library.opcheck(getattr(OPS, name).default, args)
