"""Small operations on adapters and bases: norm, scaling, projection, truncation."""

from __future__ import annotations

import math
from typing import Any

import torch
from peft.tuners.lora import LoraLayer

from benchmarks.frontier.cells import Cell
from peft_safety import SafetySubspace
from peft_safety.core.projection import orthonormalize
from peft_safety.errors import DivergedError
from peft_safety.layers.adapters import adapter_layers
from peft_safety.recipes.train import TrainingRun


@torch.no_grad()
def norm(model: torch.nn.Module, adapter: str = "default") -> float:
    """`sqrt(sum ||dW||_F^2)` over the modules of an adapter."""
    total = 0.0
    for layer in adapter_layers(model, adapter).values():
        a, b = layer.lora_A[adapter].weight.double(), layer.lora_B[adapter].weight.double()
        total += float(((b.mT @ b) * (a @ a.mT)).sum()) * float(layer.scaling[adapter]) ** 2
    return float(total**0.5)


def check_finite(model: torch.nn.Module, run: TrainingRun, cell: Cell) -> None:
    """Raises:
    DivergedError: a loss or a trained weight that is not finite (the Trainer leaves such steps out of the loss it
        reports).
    """
    bad = next(
        (name for name, p in model.named_parameters() if "lora_" in name and not bool(torch.isfinite(p).all())), None
    )
    if bad is not None or not math.isfinite(run.loss):
        raise DivergedError(
            f"{cell.label()}: {bad or 'the loss'} is not finite after {run.steps} steps at lr = {cell.lr:g}. Lower "
            "the learning rate."
        )


def truncated(subspace: SafetySubspace, size: float, side: Any = "in") -> SafetySubspace:
    """The first `size` directions of each basis; a `size` below 1 is a share of the dimensions."""
    cut: dict[int, torch.Tensor] = {}
    bases: dict[str, dict[Any, torch.Tensor]] = {}
    for name, sides in subspace.bases.items():
        u = sides[side]
        if id(u) not in cut:
            k = round(size * u.shape[0]) if size < 1 else int(size)
            cut[id(u)] = u[:, : max(1, k)].contiguous()
        bases[name] = {side: cut[id(u)]}
    facts = {k: v for k, v in subspace.provenance.items() if k != "covered"}
    return SafetySubspace(bases, None, subspace.fingerprints, {**facts, "rank": size})


def scale(model: torch.nn.Module, factor: float) -> None:
    """Multiply the update of every module by one factor."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.scaling["default"] *= factor


@torch.no_grad()
def project_randomly(model: torch.nn.Module, rank: int, outside: float, seed: int) -> None:
    """The control of Safe LoRA's "topk" and "soft": `B <- Q Q^T B + outside (B - Q Q^T B)` with random directions Q
    instead of those of the alignment.
    """
    generator = torch.Generator().manual_seed(seed)
    for layer in adapter_layers(model, "default").values():
        b = layer.lora_B["default"].weight
        q = orthonormalize(torch.randn(b.shape[0], min(rank, b.shape[0]), generator=generator)).to(b)
        inside = q @ (q.mT @ b)
        b.copy_(inside + outside * (b - inside))
