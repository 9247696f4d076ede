"""How an update `dW = s B A` lies in relation to its weight `W`: pure functions on tensors that never form dW.

Two random subspaces overlap too, the more the narrower the layer. So every figure here comes with its null.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from peft_safety.core.projection import principal_cosines, top_singular

DIRECTIONS = 8
"""Singular vectors that the published metric compares, arXiv 2510.09004."""
NULL_DRAWS = 4096
"""Draws of a null: standard error 0.25 % of its mean, 1.2 % of its standard deviation (n = 576 and 4096)."""
ROUNDING = 1e-12
"""Singular values below this share of `||B|| ||A||` are fp64 rounding (exact cancellation leaves 1e-16)."""


@dataclass(frozen=True)
class Update:
    """Thin SVD of an update, fp64, on the CPU: orthonormal columns `left (m, q)` and `right (n, q)`, and
    `values (q,)`, descending, positive. `q` is its numerical rank, 0 for a zero update.
    """

    left: Tensor
    values: Tensor
    right: Tensor

    @property
    def rank(self) -> int:
        return int(self.values.numel())

    @property
    def norm(self) -> float:
        return float(self.values.norm())

    @property
    def effective_rank(self) -> float:
        """`exp(H(sigma / sum sigma))`, NaN for a zero update. Reference: Roy and Vetterli, EUSIPCO 2007."""
        if self.rank == 0:
            return math.nan
        shares = self.values / self.values.sum()
        return math.exp(-float(torch.special.xlogy(shares, shares).sum()))

    def overlap(self, other: Update) -> float:
        """`|<dW_i, dW_j>_F| / (||dW_i|| ||dW_j||)`; NaN if one is zero. Random updates: about `1 / sqrt(m n)`."""
        if self.rank == 0 or other.rank == 0:
            return math.nan
        inner = (self.left.mT @ other.left) * (self.right.mT @ other.right)
        return min(1.0, abs(float(self.values @ inner @ other.values)) / (self.norm * other.norm))


@torch.no_grad()
def decompose(a: Tensor, b: Tensor, scaling: float = 1.0) -> Update:
    """SVD of `s B A`, of `lora_A (r, n)` and `lora_B (m, r)`, by thin QR of both factors and an `r x r` SVD."""
    a, b = a.detach().cpu().double(), b.detach().cpu().double() * scaling
    q_a, r_a = torch.linalg.qr(a.mT)
    q_b, r_b = torch.linalg.qr(b)
    left, values, right = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    rank = int((values > ROUNDING * r_a.norm() * r_b.norm()).sum())
    return Update(q_b @ left[:, :rank], values[:rank], q_a @ right[:rank].mT)


@dataclass(frozen=True)
class WeightSpan:
    """Top singular vectors `left (m, w)`, `right (n, w)` of a weight: fp64, CPU, `w` at most its rank."""

    left: Tensor
    right: Tensor
    norm: float


@torch.no_grad()
def weight_span(weight: Tensor, k: int) -> WeightSpan:
    """The singular vectors of `W (m, n)`, fp32, that `compare` needs for `k` directions."""
    left, values, right = top_singular(weight, min(max(k, DIRECTIONS), *weight.shape))
    floor = max(weight.shape) * torch.finfo(values.dtype).eps
    span = int((values > floor * values[0]).sum())  # beyond its rank a weight has no directions: any basis would do
    norm = float(torch.linalg.vector_norm(weight, dtype=torch.float64))
    return WeightSpan(left[:, :span].cpu().double(), right[:, :span].cpu().double(), norm)


@dataclass(frozen=True)
class SideOverlap:
    """One side of an update against that side of its weight. Every figure but the counts is NaN for a zero update or
    weight.

    Attributes:
        metric: largest absolute entry of `V_q(dW)^T V_p(W)`: the published metric.
        null, null_std: mean and standard deviation of the same for two independent, uniformly random subspaces.
        z: `(metric - null) / null_std`; NaN where the null does not vary.
        directions, weight_directions: `q` and `p`, at most 8; fewer where dW or W has a lower rank.
        angles: principal angles between those two subspaces, in degrees, ascending.
        energy, energy_null: share of `||dW||_F^2` inside the top-k singular subspace of W; `k / d`.
        k: directions behind `energy`; fewer than asked for where W has a lower rank.
    """

    metric: float
    null: float
    null_std: float
    z: float
    directions: int
    weight_directions: int
    angles: tuple[float, ...]
    energy: float
    energy_null: float
    k: int

    @property
    def angle(self) -> float:
        return self.angles[0] if self.angles else math.nan

    @property
    def energy_ratio(self) -> float:
        """Energy against its null: 1 is chance."""
        return self.energy / self.energy_null


@torch.no_grad()
def compare(vectors: Tensor, values: Tensor, weight_vectors: Tensor, k: int) -> SideOverlap:
    """Compare the right singular vectors `(d, r)` of dW, fp64, or the left ones, with those `(d, w)` of W; `k` of
    these count for the energy overlap. The published metric (arXiv 2510.09004; the nulls are ours) depends on the
    single singular vectors, so it is arbitrary where singular values coincide; angles and energy are not.
    """
    d = vectors.shape[0]
    q, p = min(DIRECTIONS, vectors.shape[1]), min(DIRECTIONS, weight_vectors.shape[1])
    k = min(k, weight_vectors.shape[1])
    if q == 0 or p == 0:
        nan = math.nan
        return SideOverlap(nan, nan, nan, nan, q, p, (), nan, nan, k)
    few, few_weight = vectors[:, :q], weight_vectors[:, :p]
    metric = float((few.mT @ few_weight).abs().max())
    cosines = principal_cosines(few, few_weight)
    null, std = random_metric(d, p, q)
    inside = values.square() @ (weight_vectors[:, :k].mT @ vectors).square().sum(0)
    return SideOverlap(
        metric=metric,
        null=null,
        null_std=std,
        z=(metric - null) / std if std > ROUNDING else math.nan,
        directions=q,
        weight_directions=p,
        angles=tuple(torch.rad2deg(torch.acos(cosines)).tolist()),
        energy=float(inside / values.square().sum()),
        energy_null=k / d,
        k=k,
    )


@functools.cache
def random_metric(d: int, p: int, q: int) -> tuple[float, float]:
    """Mean and standard deviation of the published metric for two independent, uniformly random subspaces of `R^d`.
    One of them may be spanned by the first q axes; of a Gaussian `d x p` matrix only the first q rows and the
    triangular factor of the others matter (Bartlett's decomposition).
    """
    generator = np.random.default_rng([0, d, p, q])
    rest = min(d - q, p)
    others = np.triu(generator.standard_normal((NULL_DRAWS, rest, p)), 1)
    for i in range(rest):
        others[:, i, i] = np.sqrt(generator.chisquare(d - q - i, NULL_DRAWS))
    stacked = np.concatenate([generator.standard_normal((NULL_DRAWS, q, p)), others], axis=1)
    frames = torch.linalg.qr(torch.from_numpy(stacked)).Q
    values = frames[:, :q].abs().amax(dim=(1, 2))
    return float(values.mean()), float(values.std())
