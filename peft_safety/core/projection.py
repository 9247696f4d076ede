"""The mathematics of the package: low-rank projections, as pure functions on tensors.

A basis `u` is `(d, k)` with orthonormal columns; a factor `w` is `lora_B (d, r)` on the output side or `lora_A (r, d)`
on the input side. The complement `C = I - U U^T` is never formed: all work is with `U^T w`, at `O(d k r)`.

Two constraints keep a factor out of the span of `u`: "out" (`lora_B`) and "in" (`lora_A`). The third, "window", keeps
`lora_A` in that span. Where the span lies in the complement of a null space, few columns do the work of its many.

The inputs of an embedding are tokens. A basis of some of them, `k` unit vectors, is given by their indices: an integer
tensor `(k,)` in place of `(d, k)`. Its constraint ("in") keeps columns of `lora_A` at zero, exactly, in any dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Side = Literal["out", "in", "window"]
SIDES: tuple[Side, ...] = ("out", "in", "window")

#: Largest `max|U^T U - I|` that a basis may have (fp32 QR of any shape stays below 1e-6).
ORTHONORMAL_TOLERANCE = 1e-5
#: A factor counts as folded below this multiple of its dtype's epsilon: one fp32 projection leaves 0.3 to 2.7, and
#: rounding an exact one to 16 bits at most 0.5.
FOLD_EPSILONS = 4.0
FOLD_EPSILONS_HALF = 0.6
HALF = (torch.bfloat16, torch.float16)
#: Largest relative leak of a stored fp32 factor that counts as protected.
LEAK_TOLERANCE = 1e-6
#: Relative length below which a further direction counts as part of a span: a third of the leak's tolerance, and above
#: what rounding a basis to fp32 leaves.
UNION_TOLERANCE = 3e-7
#: Passes that `fold_` may take. Two are enough unless almost all of the factor lies in the protected span.
FOLD_PASSES = 3
#: With matrix products in TF32 or bf16, one pass leaves 1e-4 of what it removes; a second one leaves 1e-4 of that.
LOW_PRECISION_PASSES = 2
#: Columns beyond the wanted ones, and iterations with `W S W^T` (each worth two with `W X`), in `top_left_singular`.
OVERSAMPLING = 16
POWER_ITERATIONS = 8


def is_tokens(u: Tensor) -> bool:
    """Whether a basis is a set of tokens."""
    return u.ndim == 1


def fits(u: Tensor, features: int) -> bool:
    """Whether a basis is one of so many features (of a vocabulary that large)."""
    return int(u.max()) < features if is_tokens(u) else u.shape[0] == features


def _double(u: Tensor) -> Tensor:
    return u if is_tokens(u) else u.double()


def coefficients(u: Tensor, w: Tensor, side: Side) -> Tensor:
    """What a constraint removes: coordinates in the protected span, `U^T w (k, r)` for `"out"`, `w U (r, k)` for
    `"in"`; the part outside the window, `w - (w U) U^T (r, d)`, for `"window"`.
    """
    if is_tokens(u):
        return w[:, u]
    if side == "window":
        return w - (w @ u) @ u.mT
    return u.mT @ w if side == "out" else w @ u


def project_out(u: Tensor, w: Tensor, side: Side = "out") -> Tensor:
    """Remove from a factor what its constraint forbids: `w - U (U^T w)`, `w - (w U) U^T`, or for a window all but
    `(w U) U^T`. Basis and factor have one dtype. Differentiable and self-adjoint.

    Reference: SaLoRA, arXiv 2501.01765, with `C = I - U U^T` applied to the weight instead of to the activations.
    """
    if is_tokens(u):
        return w.index_fill(1, u.to(w.device), 0)
    if side == "window":
        return (w @ u) @ u.mT
    c = coefficients(u, w, side)
    return w - u @ c if side == "out" else w - c @ u.mT


def project_wide(u: Tensor, w: Tensor, side: Side) -> Tensor:
    """`project_out` in fp32 or better, back in the dtype of `w`. Differentiable."""
    if is_tokens(u):
        return project_out(u, w, side)
    wide = torch.promote_types(u.dtype, w.dtype)
    # a compiled product may run later, where low precision is allowed
    exact = not torch.compiler.is_compiling() and _full_precision()
    if side == "window" and not exact:  # a product that is all of the result gains nothing from a second pass
        wide = torch.float64
    u, p = u.to(wide), w.to(wide)
    for _ in range(1 if exact else LOW_PRECISION_PASSES):
        p = project_out(u, p, side)
    return p.to(w.dtype)


def _full_precision() -> bool:
    """Whether fp32 matrix products are computed in fp32 on every device."""
    backends = (torch.backends.cuda, torch.backends.mkldnn)
    precisions = [getattr(getattr(backend, "matmul", None), "fp32_precision", None) for backend in backends]
    if None in precisions:  # torch before 2.9
        return torch.get_float32_matmul_precision() == "highest"
    return all(precision in ("none", "ieee") for precision in precisions)


@torch.no_grad()
def leak(u: Tensor, w: Tensor, side: Side = "out") -> float:
    """Share of a factor in the protected span (or outside its window), `||U^T w||_F / ||w||_F`, in fp64."""
    w = w.double()
    total = float(torch.linalg.vector_norm(w))
    return float(torch.linalg.vector_norm(coefficients(_double(u), w, side))) / total if total > 0 else 0.0


@torch.no_grad()
def delta_leak(u: Tensor, a: Tensor, b: Tensor, side: Side = "out") -> float:
    """`||U^T B A||_F / ||B A||_F` (or `||B A U|| / ||B A||`) without forming the `m x n` product of `a (r, n)` and `b
    (m, r)`. The basis is `(m, k)` for `"out"`, else `(n, k)`.
    """
    u, a, b = _double(u), a.double(), b.double()
    r_a = torch.linalg.qr(a.mT, mode="r").R  # B A = (B R^T) Q^T with orthonormal Q, so norms need r x r work only
    r_b = torch.linalg.qr(b, mode="r").R
    total = float(torch.linalg.matrix_norm(r_b @ r_a.mT))
    part = u.mT @ b @ r_a.mT if side == "out" else r_b @ coefficients(u, a, side)
    return float(torch.linalg.matrix_norm(part)) / total if total > 0 else 0.0


def fold_tolerance(dtype: torch.dtype) -> float:
    """Relative leak below which a factor stored in `dtype` counts as folded."""
    return (FOLD_EPSILONS_HALF if dtype in HALF else FOLD_EPSILONS) * torch.finfo(dtype).eps


def leak_tolerance(dtype: torch.dtype) -> float:
    """Largest relative leak that still counts as protected: `LEAK_TOLERANCE`, or some roundings to `dtype`."""
    return max(LEAK_TOLERANCE, FOLD_EPSILONS * torch.finfo(dtype).eps)


@torch.no_grad()
def fold_(u: Tensor, w: Tensor, side: Side = "out") -> bool:
    """Project a factor in place if it leaks, so that folding twice changes no bit. Returns whether it was written."""
    for done in range(FOLD_PASSES):
        if leak(u, w, side) <= fold_tolerance(w.dtype):
            return done > 0
        w.copy_(project_out(_double(u), w.double(), side))
    return True


def all_finite(x: Tensor) -> bool:
    """Whether no value is NaN or Inf. The sum shows it at a fraction of the cost, unless it overflows."""
    return math.isfinite(x.sum().item()) or bool(torch.isfinite(x).all())


def orthonormality_error(u: Tensor) -> float:
    """`max|U^T U - I|`, in fp64; 0 for distinct tokens."""
    if is_tokens(u):
        return 0.0
    u = u.double()
    return float((u.mT @ u - torch.eye(u.shape[1], dtype=u.dtype, device=u.device)).abs().max())


def orthonormalize(x: Tensor) -> Tensor:
    """Orthonormal basis `(d, k)` of the column span of a full-rank `x (d, k)`."""
    return torch.linalg.qr(x).Q


@torch.no_grad()
def union(u: Tensor | None, x: Tensor) -> Tensor:
    """Orthonormal basis `(d, k')` of the span of a basis `u (d, k)`, or None, and of further columns `x (d, l)`. The
    basis comes first and unchanged; columns in the span of others, up to `UNION_TOLERANCE`, add nothing.
    """
    own = torch.linalg.svd(x.double(), full_matrices=False)
    independent = own.U[:, UNION_TOLERANCE * own.S[:1].clamp(min=torch.finfo(torch.float64).tiny) < own.S]
    if u is None:
        return independent.to(x.dtype)
    for _ in range(2):  # the second pass removes what rounding left of the first
        independent = project_out(u.double(), independent)
    left, s, _ = torch.linalg.svd(independent, full_matrices=False)
    return torch.cat([u, left[:, s > UNION_TOLERANCE].to(u)], dim=1)


def principal_cosines(u: Tensor, v: Tensor) -> Tensor:
    """Cosines of the principal angles between two spans `(d, k)` and `(d, l)`, descending, `(min(k, l),)`."""
    return torch.linalg.svdvals(u.double().mT @ v.double()).clamp(max=1.0)


def top_left_singular(
    weight: Tensor,
    moment: Tensor | None,
    rank: int,
    *,
    seed: int = 0,
    oversampling: int = OVERSAMPLING,
    iterations: int = POWER_ITERATIONS,
) -> tuple[Tensor, Tensor]:
    """Top left singular vectors of `W X`, given `W` and the second moment `S = X X^T`, by randomized subspace
    iteration; deterministic for a seed. Nothing larger than `m x (rank + oversampling)` is made, but for more than
    half of all directions one dense SVD of `W S^(1/2)` is cheaper and exact.

    Args:
        weight: `W (m, n)`.
        moment: `S (n, n)`, symmetric positive semi-definite; `None` means the identity.
        rank: wanted vectors, `1 <= rank <= m`.

    Returns:
        `(U (m, rank), s (rank,))`, `s` descending, in the dtype of `weight`.
    """
    m = weight.shape[0]
    width = min(rank + oversampling, m)
    if 2 * width > min(weight.shape):
        if moment is not None:
            eigenvalues, vectors = torch.linalg.eigh(moment)
            weight = weight @ (vectors * eigenvalues.clamp(min=0).sqrt())
        u, s, _ = torch.linalg.svd(weight, full_matrices=False)
        return u[:, :rank], s[:rank]

    def apply(q: Tensor) -> Tensor:
        t = weight.mT @ q
        return weight @ (t if moment is None else moment @ t)

    u, values = top_eigenvectors(apply, m, width, like=weight, seed=seed, iterations=iterations)
    return u[:, :rank], values[:rank].clamp(min=0).sqrt()


def top_eigenvectors(
    apply: Callable[[Tensor], Tensor],
    dimension: int,
    width: int,
    *,
    like: Tensor,
    seed: int = 0,
    iterations: int = POWER_ITERATIONS,
) -> tuple[Tensor, Tensor]:
    """Leading eigenvectors of a symmetric positive semi-definite operator, known only by its products.

    Args:
        apply: `(dimension, width)` -> `(dimension, width)`; called `iterations + 2` times.
        width: vectors iterated. The last few are oversampling: not accurate.
        like: a tensor of the dtype and on the device to compute in.

    Returns: orthonormal `(dimension, width)` and the Ritz values `(width,)`, descending.

    Reference: Halko, Martinsson, Tropp, arXiv 0909.4061, algorithm 4.4 with a Rayleigh-Ritz step.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    q = torch.randn(dimension, width, generator=generator, dtype=torch.float64).to(like)
    for _ in range(iterations + 1):
        q = orthonormalize(apply(q))
    small = q.mT @ apply(q)
    values, vectors = torch.linalg.eigh((small + small.mT) / 2)
    return orthonormalize(q @ vectors.flip(1)), values.flip(0)


def top_singular(weight: Tensor, rank: int, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Truncated SVD `W ~ U diag(s) V^T`: `(U (m, rank), s (rank,), V (n, rank))`, by randomized subspace iteration."""
    width = min(rank + OVERSAMPLING, *weight.shape)
    u, _ = top_left_singular(weight, None, width, seed=seed, oversampling=0)
    left, s, vh = torch.linalg.svd(u.mT @ weight, full_matrices=False)
    return (u @ left)[:, :rank], s[:rank], vh[:rank].mT
