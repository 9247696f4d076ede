"""GuardSpace's initialization: the part of a weight that does least on the calibration data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from peft_safety.calibration.bases import RIDGE, check_moment
from peft_safety.errors import CalibrationError

Kind = Literal["root", "moment"]
DEAD = 1e-10
"""Singular values below this share of the largest are zeros of fp64: factors made of them would never train."""


@dataclass(frozen=True)
class Preconditioner:
    """`C`, `Sigma^(1/2)` or `Sigma` (the second moment at mean eigenvalue 1, plus a ridge), and its inverse, fp64."""

    matrix: Tensor
    inverse: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, moment: Tensor, kind: Kind, name: str) -> Preconditioner:
        """From a second moment of any scale. With "root" the decomposition minimizes the error on the data."""
        total = check_moment(moment, name)
        values, vectors = torch.linalg.eigh(moment.double() * (moment.shape[0] / total))
        values = values.clamp(min=0) + RIDGE
        scale = values.sqrt() if kind == "root" else values
        return cls((vectors * scale) @ vectors.mT, (vectors / scale) @ vectors.mT)


@torch.no_grad()
def irrelevant_factors(weight: Tensor, preconditioner: Preconditioner, rank: int, name: str) -> tuple[Tensor, Tensor]:
    """`B0 = U_r sqrt(S_r) (m, r)` and `A0 = sqrt(S_r) V_r^T C^-1 (r, n)`, fp32, of the *smallest* r components of `W C
    = U S V^T`, for `1 <= r <= min(m, n)`. With `C = Sigma^(1/2)` no other rank-r part of this form has less energy on
    the data: `E||B0 A0 x||^2` is the sum of the r smallest `S^2`. All components together give back `W (m, n)`.

    Raises:
        CalibrationError: the weight's smallest components are zero, so that neither factor would ever get a gradient.

    Reference: GuardSpace, arXiv 2510.14301, with `C = Sigma`; the decomposition is CorDA's, arXiv 2406.05223.
    """
    u, s, vh = torch.linalg.svd(weight.double() @ preconditioner.matrix, full_matrices=False)
    u, kept, vh = u[:, -rank:], s[-rank:], vh[-rank:]
    if not float(kept.max()) > DEAD * float(s[0]):
        zero = f"{name}: the {rank} smallest components of this {tuple(weight.shape)} weight are zero"
        raise CalibrationError(f"{zero}, and factors made of them would never train. Use a larger r, or init='lora'.")
    root = kept.sqrt()
    return (u * root).float(), (root[:, None] * vh @ preconditioner.inverse).float()
