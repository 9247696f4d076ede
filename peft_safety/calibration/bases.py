"""From second moments `S = sum_t x_t x_t^T (n, n)`, not normalized, and weights to bases, without running a model. A
basis comes with a spectrum, descending: the square roots of the eigenvalues behind it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from peft_safety.calibration.sizes import Size
from peft_safety.calibration.token_counts import TokenCounts
from peft_safety.calibration.token_rows import TokenRows
from peft_safety.core import projection
from peft_safety.core.projection import OVERSAMPLING
from peft_safety.errors import CalibrationError

RANK_FLOORS = {torch.float32: 1e-3, torch.float64: 1e-6}
"""Singular values below this share of the largest are noise. In a fp32 moment of exact rank r the next value reaches
9e-4 (about the square root of epsilon); a fp64 moment resolves fp32 activations down to their rounding."""
RIDGE = 1e-3
"""Share of the mean eigenvalue added to `S'`, so that directions which neither data set uses do not count."""
WEIGHT_ITERATIONS = 2
"""Iterations with `W W^T` for weight bases (each is worth two with `W`); measured in benchmarks/subspace.py."""
DENSE_LIMIT = 2048
"""Moments up to this size are decomposed exactly, which is as fast as iterating where many directions are wanted."""


def check_moment(moment: Tensor | TokenRows | TokenCounts, name: str) -> float:
    """Trace of a moment. A CalibrationError refuses one that is zero or not finite."""
    total = float(moment.diagonal().double().sum())
    if not bool(moment.isfinite().all()) or not total > 0:
        what = "is zero" if total == 0 else "holds NaN or Inf"
        raise CalibrationError(f"{name}: the second moment {tuple(moment.shape)} {what}. Load the model in fp32.")
    return total


@torch.no_grad()
def output_basis(
    weight: Tensor, moment: Tensor | None, size: Size, name: str, *, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Top left singular vectors `(m, k)` of `W X`, or of `W` without a moment `(n, n)`, and the singular values."""
    m, n = weight.shape
    if not (0 < float(weight.abs().sum(dtype=torch.float64)) < float("inf")):
        raise CalibrationError(f"{name}: the weight {(m, n)} is zero or holds NaN or Inf. Load an intact checkpoint.")
    if moment is not None:
        check_moment(moment, name)
        moment = moment.to(weight)
    iterations = WEIGHT_ITERATIONS if moment is None else projection.POWER_ITERATIONS
    k = size.fixed((m, min(m, n) if moment is None else n), "out", name)
    width = min(k or 2 * OVERSAMPLING, m, n)
    while True:
        u, s = projection.top_left_singular(weight, moment, width, seed=seed, iterations=iterations)
        if size.energy is None:
            return _spanned(_exact(u), s, weight.dtype)
        total = float((weight * (weight if moment is None else weight @ moment)).sum(dtype=torch.float64))
        limit = size.limit((m, min(m, n)), "out")
        enough = min(_enough(s.double().square(), total, size.energy), limit)
        if enough < width or enough == limit or width == min(m, n):
            return _spanned(_exact(u[:, :enough]), s[:enough], weight.dtype)
        width = min(2 * width, m, n)


@torch.no_grad()
def output_basis_in_groups(
    weight: Tensor, moment: Tensor | None, size: Size, groups: int, name: str, *, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """`output_basis` of a grouped convolution, whose `lora_B` is block-diagonal: each direction is one of a group."""
    if groups == 1:
        return output_basis(weight, moment, size, name, seed=seed)
    m = weight.shape[0] // groups
    rank = size.rank if size.rank is None else min(-(-size.rank // groups), m - 1)
    part = replace(size, rank=rank, most=m - 1)
    found = [output_basis(w, moment, part, name, seed=seed) for w in weight.chunk(groups)]
    columns = torch.block_diag(*(u[:, : part.most] for u, _ in found))
    values = torch.cat([s[: part.most] for _, s in found])
    order = values.argsort(descending=True)[: size.rank]
    return columns[:, order], values[order]


@torch.no_grad()
def input_basis(moment: Tensor | TokenRows, size: Size, name: str, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Top eigenvectors `(n, k)` of `S = X X^T`, and the singular values of `X`. With `P = I - Q Q^T` behind a factor,
    `E||dW x||^2 <= lambda_{k+1} ||dW||_F^2` on the data of `S`, `lambda` the eigenvalues of `E[x x^T]`.

    Reference: GuardSpace, arXiv 2510.14301 (on harmful data); on general data, OrthoSafetyPatch.
    """
    n = moment.shape[0]
    total = check_moment(moment, name)
    k, limit = size.fixed((n, n), "in", name), size.limit((n, n), "in")
    width = n if n <= DENSE_LIMIT else min(n, (k or min(limit, 4 * OVERSAMPLING)) + OVERSAMPLING)
    while True:
        if n <= DENSE_LIMIT:
            dense = moment.dense() if isinstance(moment, TokenRows) else moment
            values, vectors = torch.linalg.eigh(dense.double())
            values, vectors = values.flip(0), vectors.flip(1)
        else:
            vectors, values = projection.top_eigenvectors(
                lambda q: moment @ q, n, width, like=moment.diagonal(), seed=seed
            )
        values = values.clamp(min=0)
        enough = min(_enough(values, total, size.energy or 1.0), limit) if k is None else k
        if k is not None or width == n or enough <= width - OVERSAMPLING:
            return _spanned(vectors[:, :enough], values[:enough].sqrt(), moment.dtype)
        width = min(n, 2 * width)


@torch.no_grad()
def contrastive_basis(moment: Tensor, against: Tensor, size: Size, name: str) -> tuple[Tensor, Tensor]:
    """Span `(d, k)` of the directions that one data set uses most, relative to another: top generalized eigenvectors
    of `S v = mu S' v`, and `sqrt(mu)`. An energy is the share of `S` that the basis holds. `RIDGE` is added to `S'`.
    """
    d = moment.shape[0]
    total, other = check_moment(moment, name), check_moment(against, name)
    k = size.fixed((d, d), "in", name)
    s = moment.double()
    factor = torch.linalg.cholesky(
        against.double() * (total / other) + RIDGE * total / d * torch.eye(d, dtype=torch.float64, device=s.device)
    )
    half = torch.linalg.solve_triangular(factor, s, upper=False)
    values, vectors = torch.linalg.eigh(torch.linalg.solve_triangular(factor, half.mT, upper=False))
    directions = projection.orthonormalize(torch.linalg.solve_triangular(factor.mT, vectors.flip(1), upper=True))
    if k is None:
        k = min(_enough((directions * (s @ directions)).sum(0), total, size.energy or 1.0), size.limit((d, d), "in"))
    return _spanned(directions[:, :k], values.flip(0)[:k].clamp(min=0).sqrt(), moment.dtype)


def _enough(values: Tensor, total: float, energy: float) -> int:
    """How many leading values hold the share `energy` of `total`; all if they hold less."""
    return min(int((values.cumsum(0) < energy * total * (1 - 1e-12)).sum()) + 1, values.numel())


def _spanned(u: Tensor, s: Tensor, precision: torch.dtype) -> tuple[Tensor, Tensor]:
    """In fp32, without the directions below the rounding noise of the moment."""
    span = int((s > RANK_FLOORS[precision] * s[0]).sum())
    return u[:, :span].float(), s[:span].float()


def _exact(u: Tensor) -> Tensor:
    """Vectors of a decomposition in fp32, orthonormal to fp64: on a GPU they are off by 1e-4."""
    q, r = torch.linalg.qr(u.double())
    return q * r.diagonal().sign()
