"""A direction that separates two classes of vectors, how well it does so, and a threshold on it."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def discriminant(harmful: Tensor, harmless: Tensor, shrinkage: float) -> Tensor:
    """The unit vector `(d,)`, fp64, along `((1 - s) S + s tr(S)/d I)^-1 (mean of harmful - mean of harmless)`.

    Args:
        harmful, harmless: `(n, d)` each; S is the covariance within the classes.
        shrinkage: s in (0, 1]; at 1 the direction is the difference of the means.

    Reference: regularized linear discriminant analysis, J. H. Friedman, JASA 84 (1989).
    """
    classes = [x.double() for x in (harmful, harmless)]
    difference = classes[0].mean(0) - classes[1].mean(0)
    if shrinkage < 1:
        centered = torch.cat([x - x.mean(0) for x in classes])
        spread = centered.mT @ centered / len(centered)
        scale = spread.diagonal().mean()
        if scale > 0:  # else nothing varies within a class
            eye = torch.eye(len(spread), dtype=spread.dtype, device=spread.device)
            factor = torch.linalg.cholesky((1 - shrinkage) * spread + shrinkage * scale * eye)
            difference = torch.cholesky_solve(difference[:, None], factor)[:, 0]
    return difference / difference.norm().clamp(min=torch.finfo(torch.float64).tiny)


def auc(positive: Tensor, negative: Tensor) -> float:
    """The probability that a positive score is above a negative one; equal ones count half."""
    pairs = positive[:, None] - negative[None, :]
    return float((pairs > 0).double().mean() + (pairs == 0).double().mean() / 2)


def threshold_at(negative: Tensor, rate: float) -> float:
    """The lowest of the `negative` scores that at most this share of them is above."""
    allowed = math.floor(rate * len(negative) + 1e-9)  # 0.29 * 100 is 28.999...
    return float(negative.sort(descending=True).values[allowed])
