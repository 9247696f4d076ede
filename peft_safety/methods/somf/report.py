"""What a fusion did."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from peft_safety.methods.somf.masks import Masks
from peft_safety.methods.somf.plan import FusePlan
from peft_safety.methods.somf.train import MaskRun


@dataclass(frozen=True)
class ModuleFusion:
    """One module, or one tensor of a checkpoint.

    Attributes:
        rank: of the result; 0 for full weights.
        density: share of its mask that is kept; None without a mask.
        kept: `||task part|| / ||task part without the mask||`; None where that is zero.
        error: `||recompressed - exact|| / ||exact||` of the whole update; 0 where it is exact.
    """

    name: str
    rank: int
    density: float | None
    kept: float | None
    error: float


@dataclass(frozen=True)
class FuseReport:
    """Every module in order, and what decided the result.

    Attributes:
        record: stored with the result: options, inputs with their fingerprints, density, mask.
        run: what training the mask cost; None where none was trained.
        masks: what was applied; None without.
        logits: of a mask that was trained or given as logits: any density can be exported from them again.
        factors: `{module: (A, B)}` of a LoRA result, the scaling folded into B; empty for full weights.
    """

    plan: FusePlan
    modules: tuple[ModuleFusion, ...]
    record: dict[str, Any]
    run: MaskRun | None = None
    masks: Masks | None = None
    logits: dict[str, Tensor] | None = None
    factors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**self.record, "modules": [asdict(module) for module in self.modules]}


def product_norm(pairs: list[tuple[Tensor, Tensor, float]]) -> float:
    """`||sum_i c_i B_i A_i||_F` of `(A_i, B_i, c_i)`, by thin QR: nothing of the size of the weight is made."""
    a = torch.cat([a.double() for a, _, _ in pairs])
    b = torch.cat([c * b.double() for _, b, c in pairs], dim=1)
    return float(torch.linalg.matrix_norm(torch.linalg.qr(b, mode="r").R @ torch.linalg.qr(a.mT, mode="r").R.mT))


def share(part: float, whole: float) -> float | None:
    """`part / whole`, or None where there is nothing to divide by."""
    return part / whole if whole > 0 and math.isfinite(part) else None


def overall(modules: tuple[ModuleFusion, ...], masks: Masks | None, covers: Mapping[str, int]) -> dict[str, Any]:
    """The record's figures over all modules."""
    found: dict[str, Any] = {"modules": len(modules)}
    ranks = max((module.rank for module in modules), default=0)
    if ranks:
        found |= {"rank": ranks, "largest_error": max(module.error for module in modules)}
    if masks is not None:
        found |= {"density": masks.density(covers)}
    return found
