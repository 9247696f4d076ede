"""How several task vectors become one, each as a pure function that can be read beside its formula. Torch only.

A task vector `V_i` is what a fine-tuned tensor added to the aligned one, of any shape; all vectors of a call have the
same shape.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from peft_safety.errors import ConfigError

Fusion = Literal["single", "task_arithmetic", "dare", "ties", "average"]
Merge = Literal["sum", "mean"]


def single(vectors: Sequence[Tensor]) -> Tensor:
    """`V_1`: one task, not scaled.

    Raises:
        ConfigError: more than one vector.
    """
    if len(vectors) != 1:
        raise ConfigError(
            f"fusion 'single' got {len(vectors)} task vectors of {tuple(vectors[0].shape)}. Choose task_arithmetic, "
            "dare, ties or average."
        )
    return vectors[0]


def task_arithmetic(vectors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """`sum_i w_i V_i`.

    Reference: Ilharco et al., arXiv 2212.04089. SOMF's reference code ignores the weight of a lone vector; here that
        is `single`.
    """
    return torch.stack([w * v for w, v in zip(weights, vectors, strict=True)]).sum(dim=0)


def average(vectors: Sequence[Tensor]) -> Tensor:
    """`(1 / T) sum_i V_i`."""
    return torch.stack(list(vectors)).mean(dim=0)


def dare(vectors: Sequence[Tensor], keeps: Sequence[Tensor], drop: float, weights: Sequence[float]) -> Tensor:
    """`sum_i w_i K_i V_i / (1 - p)`: entries dropped at random, the rest scaled up.

    Args:
        keeps: `K_i`, 0 or 1, of the shape of `V_i`; see `drop_masks`.
        drop: `p`, the probability of a zero in `K_i`.

    Reference: Yu et al., arXiv 2311.03099.
    """
    return task_arithmetic([k * v / (1 - drop) for k, v in zip(keeps, vectors, strict=True)], weights)


def ties(
    vectors: Sequence[Tensor], thresholds: Sequence[Tensor], weights: Sequence[float], *, merge: Merge = "sum"
) -> Tensor:
    """Trim, elect a sign, merge what agrees with it: `sum_i w_i V_i [|V_i| >= t_i and sign V_i = sign sum_j V_j]`,
    divided by how many agree for "mean".

    The choice of entries is piecewise constant, so the gradient is that of the chosen entries: exact almost
    everywhere, for every task.

    Args:
        thresholds: `t_i`, scalars; see `trim_threshold`.
        merge: "sum" as SOMF's reference code, "mean" as the paper of TIES and PEFT.

    Reference: Yadav et al., arXiv 2306.01708; where the elected sum is zero, the positive sign (as PEFT).
    """
    kept = torch.stack([v * (v.abs() >= t) for v, t in zip(vectors, thresholds, strict=True)])
    elected = torch.where(kept.detach().sum(dim=0) >= 0, 1.0, -1.0)
    agrees = kept.detach().sign() == elected
    scale = torch.tensor(list(weights), dtype=kept.dtype, device=kept.device).view(-1, *[1] * (kept.dim() - 1))
    fused = (scale * kept * agrees).sum(dim=0)
    if merge == "mean":
        fused = fused / agrees.sum(dim=0).clamp(min=1)
    return fused


@torch.no_grad()
def trim_threshold(vector: Tensor, density: float) -> Tensor:
    """Magnitude of the `round(density n)`-th largest entry: what is not smaller is kept. Equal magnitudes are kept
    together.

    SOMF's reference code keeps one entry more, over the whole model instead of a tensor.
    """
    flat = vector.abs().flatten()
    keep = max(1, round(density * flat.numel()))
    return flat.kthvalue(flat.numel() - keep + 1).values


def drop_masks(shape: tuple[int, ...], count: int, drop: float, seed: int, name: str, like: Tensor) -> list[Tensor]:
    """DARE's `K_i`: the same for the same seed and tensor name, whatever else is fused. Drawn on the CPU, where a seed
    means the same on every machine.
    """
    found = []
    for index in range(count):
        generator = torch.Generator().manual_seed(stream(seed, "dare", name, index))
        found.append((torch.rand(shape, generator=generator) >= drop).to(like.device, like.dtype))
    return found


def stream(*parts: object) -> int:
    """A seed that depends on all parts, and on nothing else."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:7], "big")
