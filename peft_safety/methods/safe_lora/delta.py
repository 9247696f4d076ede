"""The alignment direction of one weight, `V = W_aligned - W_unaligned`, streamed, and projections onto it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from peft_safety.core.checkpoints import Matrix
from peft_safety.core.projection import OVERSAMPLING, POWER_ITERATIONS, project_out, top_eigenvectors
from peft_safety.errors import CheckpointError
from peft_safety.methods.safe_lora.config import RepairOptions

BLOCK_BYTES = 4 << 20
"""Size of one block of V in fp32, of which two are held: small enough for the cache."""
FIRST_WIDTH = 32


def block_width(rows: int) -> int:
    return max(16, BLOCK_BYTES // (4 * rows))


@dataclass
class Delta:
    """`V (m, n)`, one block of columns `V_j` at a time: `V V^T q = sum_j V_j (V_j^T q)` is one pass over both
    checkpoints, which also gives `energy`, `||V||_F^2`, and `base_norm`, `||W_aligned||_F`.
    """

    name: str
    aligned: Matrix
    unaligned: Matrix
    dtype: torch.dtype
    device: torch.device
    energy: float = math.nan
    base_norm: float = math.nan

    def blocks(self) -> Iterator[Tensor]:
        """`V_j (m, c)`, left to right, each in the memory of the one before, which is faster. Refuses NaN and Inf."""
        energy = torch.zeros((), dtype=torch.float64, device=self.device)
        base = torch.zeros_like(energy)
        m, n = self.aligned.shape
        width = block_width(m)
        kept, other = (torch.empty(m, min(width, n), dtype=self.dtype, device=self.device) for _ in range(2))
        for start in range(0, n, width):
            stop = min(start + width, n)
            v, wu = kept[:, : stop - start], other[:, : stop - start]
            base += _square_sum(v.copy_(self.aligned.block(start, stop)))
            energy += _square_sum(v.sub_(wu.copy_(self.unaligned.block(start, stop))))
            yield v
        self.energy, self.base_norm = float(energy), math.sqrt(float(base))
        if not math.isfinite(self.energy) or not math.isfinite(self.base_norm):
            which = "aligned" if not math.isfinite(self.base_norm) else "unaligned"
            raise CheckpointError(f"{self.name}: the {which} weight {(m, n)} holds NaN or Inf. Use an intact one.")

    def apply(self, q: Tensor) -> Tensor:
        """`V V^T q (m, w)`, in one pass."""
        total = torch.zeros_like(q)
        for v in self.blocks():
            total.addmm_(v, v.mT @ q)
        return total


def _square_sum(block: Tensor) -> Tensor:
    """`||block||_F^2`, summed over the rows in fp64: one fp32 norm over millions of values is off by 1e-3."""
    return torch.linalg.vector_norm(block, dim=1).double().square().sum()


def projected(delta: Delta, b: Tensor, options: RepairOptions) -> tuple[Tensor, Tensor, int | None]:
    """What a module with the factor `b (m, r)` gets if it is selected, `B' (m, r)`; the projection `C B (m, r)` that
    the cosine is taken of (for all but "soft" the same up to its length); and the rank of the projector, if any.

    Reference: Safe LoRA, arXiv 2405.16833, equation 2 ("frobenius"). "spectral" and "topk" replace its `V V^T /
    ||V||_F` by a contraction and by a true projector. "soft" is the minimizer of `||B' - B||^2 + penalty ||(I - U U^T)
    B'||^2`, which is `U U^T B + (I - U U^T) B / (1 + penalty)`.
    """
    u = _alignment_basis(delta, b, options) if options.projection in ("topk", "soft") else None
    cb = delta.apply(b) if u is None else b - project_out(u, b)
    if delta.energy == 0:
        return torch.zeros_like(b), torch.zeros_like(b), None
    if u is not None:
        return cb + (b - cb) / (1 + options.penalty) if options.projection == "soft" else cb, cb, u.shape[1]
    if options.projection == "frobenius":
        return cb / math.sqrt(delta.energy), cb, None
    _, values = top_eigenvectors(delta.apply, b.shape[0], min(OVERSAMPLING, b.shape[0]), like=b)
    return cb / values[0], cb, None


def _alignment_basis(delta: Delta, like: Tensor, options: RepairOptions) -> Tensor:
    """Top left singular vectors `(m, k)` of `V`, as many as asked for, and never more than its numerical rank."""
    (m, n), limit = delta.aligned.shape, min(delta.aligned.shape)
    width = min(options.rank or FIRST_WIDTH, limit)
    while True:
        q, _ = top_eigenvectors(
            delta.apply, m, min(width + OVERSAMPLING, limit), like=like, iterations=POWER_ITERATIONS // 2
        )
        left, s, _ = torch.linalg.svd(torch.cat([v.mT @ q for v in delta.blocks()]).mT, full_matrices=False)
        u, available = q @ left, int((s > max(m, n) * torch.finfo(s.dtype).eps * s[0]).sum())
        if options.energy is None:
            return u[:, : min(width, available)]
        shares = s.double().square().cumsum(0) / delta.energy
        enough = int((shares < options.energy).sum()) + 1
        if enough <= width or available <= width or width == limit:
            return u[:, : min(enough, available)]
        width = min(2 * width, limit)
