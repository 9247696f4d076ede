"""Every schema by torch's own check."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from peft_safety import ops
from peft_safety.errors import OperationError
from peft_safety.ops import schemas
from tests.ops.helpers import case, quantized

OPS: Any = torch.ops.peft_safety


def test_a_compute_dtype_that_no_kernel_has() -> None:
    with pytest.raises(OperationError, match="float64"):
        ops.nf4_dequant(quantized(32, 64), torch.float64)


def arguments(nested: bool) -> dict[str, list[tuple[Any, ...]]]:
    """Arguments for every op, with gradients where it has any."""
    c = case(16, 64, 3, nested=nested)

    def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, dtype=dtype, requires_grad=True)

    lora, backward = [], []
    for rows, dtype in ((2, torch.float32), (70, torch.bfloat16)):
        lora.append((leaf(rows, 64, dtype=dtype), *c.q, leaf(rows, 3), leaf(16, 3), 0.5))
        gradient, z, bp = torch.randn(rows, 16, dtype=dtype), torch.randn(rows, 3), torch.randn(16, 3)
        backward += [(gradient, *c.q, z, bp, 0.5, needs) for needs in ([True, True, True], [False, False, True])]
    half = leaf(5, 64, dtype=torch.bfloat16)
    return {
        "lora_z": [(leaf(2, 5, 64), leaf(3, 64)), (half, leaf(3, 64)), (leaf(5, 64), torch.randn(3, 64))],
        "nf4_lora": lora,
        "nf4_lora_backward": backward,
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
