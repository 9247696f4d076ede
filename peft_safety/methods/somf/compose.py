"""What a mask does to one module: from frozen inputs and masks to the fused weights. The same code trains and exports.

`Continued`: the task adapters were trained on from the safe one, so that A and B have task vectors, masked as the
    paper masks weights.
`Independent`: they were not; then rank components are gated, `dW = s B_s A_s + sum_i w_i s_i B_i diag(g_i) A_i`, an
    exact LoRA of rank `r_s + sum r_i`.
`Dense`: full weights, one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from peft_safety.errors import ConfigError
from peft_safety.methods.somf import fusions
from peft_safety.methods.somf.fusions import Fusion
from peft_safety.methods.somf.masks import Granularity, length_ratio, rescaled, rescaled_gate
from peft_safety.methods.somf.options import FuseOptions
from peft_safety.plain_lora import Factors

Shape = tuple[int, ...]


class Masked(Protocol):
    """Where masks come from, by full name: exported ones, or samples of a training step."""

    def __getitem__(self, name: str) -> Tensor: ...


def combine(vectors: Sequence[Tensor], options: FuseOptions, name: str) -> Tensor:
    """The task vectors of one tensor, fused by `options`.

    Args:
        name: of the tensor; decides DARE's drops.
    """
    tasks = len(vectors)
    fusion: Fusion = options.fusion_of(tasks)
    weights = options.weights_of(tasks)
    if fusion == "single":
        return weights[0] * fusions.single(vectors)
    if fusion == "average":
        return fusions.average(vectors)
    if fusion == "task_arithmetic":
        return fusions.task_arithmetic(vectors, weights)
    if fusion == "dare":
        keeps = fusions.drop_masks(tuple(vectors[0].shape), tasks, options.drop, options.seed, name, vectors[0])
        return fusions.dare(vectors, keeps, options.drop, weights)
    thresholds = [fusions.trim_threshold(v, options.ties_density) for v in vectors]
    return fusions.ties(vectors, thresholds, weights, merge=options.ties_merge)


def mask_shape(shape: Shape, granularity: Granularity, name: str) -> Shape:
    """Shape of the mask of one weight: of its own, or one entry a row, or one in all.

    Raises:
        ConfigError: "rank", which a weight does not have.
    """
    if granularity == "rank":
        raise ConfigError(
            f"{name} {shape}: granularity='rank' needs factors, and a full weight has none. Use element, row or "
            "module."
        )
    if granularity == "module":
        return (1,) * len(shape)
    return shape if granularity == "element" else (shape[0], *[1] * (len(shape) - 1))


class Update(nn.Module):
    """One module's fused update `B A`, the scaling included in B. Buffers are frozen; `shapes` are the masks it takes,
    by full name.
    """

    def __init__(self, name: str, options: FuseOptions) -> None:
        super().__init__()
        self.name, self.options = name, options
        self.shapes: dict[str, Shape] = {}
        self.covers: dict[str, int] = {}

    def factors(self, masks: Masked | None) -> tuple[Tensor, Tensor]:
        """`(A (r, n), B (m, r))` under these masks (None: everything is kept), differentiable in them."""
        raise NotImplementedError

    def aligned(self) -> tuple[Tensor, Tensor]:
        """The same of the safe adapter alone."""
        raise NotImplementedError

    def _dtype(self, *tensors: Tensor) -> torch.dtype:
        return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


class Continued(Update):
    """`A = A_s + F(masked A_i - A_s)`, and B likewise.

    Args:
        safe, tasks: factors of equal rank and scaling.

    Reference: SOMF, arXiv 2405.09055, section 3, on the factors as its code does.
    """

    def __init__(
        self, name: str, safe: Factors, tasks: Sequence[Factors], granularity: Granularity, options: FuseOptions
    ) -> None:
        super().__init__(name, options)
        self.scaling, self.granularity = safe.scaling, granularity
        dtype = self._dtype(safe.a, safe.b)
        for kind, tensor in (("a", safe.a), ("b", safe.b)):
            self.register_buffer(f"safe_{kind}", tensor.detach(), persistent=False)
            vectors = [
                getattr(task, kind).detach().to(tensor.device, dtype) - tensor.detach().to(dtype) for task in tasks
            ]
            self.register_buffer(f"vectors_{kind}", torch.stack(vectors), persistent=False)
        (r, n), m = safe.a.shape, safe.b.shape[0]
        if granularity in ("element", "row"):
            self.shapes = {
                f"{name}.lora_{k.upper()}": mask_shape(s, granularity, name) for k, s in (("a", (r, n)), ("b", (m, r)))
            }
            self.covers = {
                f"{name}.lora_A": 1 if granularity == "element" else n,
                f"{name}.lora_B": 1 if granularity == "element" else r,
            }
        else:
            key = f"{name}.{granularity}"
            self.shapes = {key: (r,) if granularity == "rank" else (1,)}
            self.covers = {key: (m + n) * (1 if granularity == "rank" else r)}

    def _view(self, masks: Masked, kind: str) -> Tensor:
        if self.granularity in ("element", "row"):
            return masks[f"{self.name}.lora_{kind.upper()}"]
        return masks[f"{self.name}.{self.granularity}"].view((-1, 1) if kind == "a" else (1, -1))

    def _fused(self, masks: Masked | None, kind: str) -> Tensor:
        vectors = list(self.get_buffer(f"vectors_{kind}").unbind())
        if masks is not None:
            mask = self._view(masks, kind).to(vectors[0].device)
            vectors = [rescaled(v, mask, self.options.rescale) for v in vectors]
        fused = combine(vectors, self.options, f"{self.name}.lora_{kind.upper()}")
        return self.get_buffer(f"safe_{kind}").to(fused.dtype) + fused

    def factors(self, masks: Masked | None) -> tuple[Tensor, Tensor]:
        return self._fused(masks, "a"), self.scaling * self._fused(masks, "b")

    def aligned(self) -> tuple[Tensor, Tensor]:
        dtype = self.get_buffer("vectors_a").dtype
        return self.get_buffer("safe_a").to(dtype), self.scaling * self.get_buffer("safe_b").to(dtype)


class Independent(Update):
    """`A = [A_s; A_1; ...]`, `B = [s B_s, w_1 s_1 B_1 diag(g_1), ...]`.

    "rank" has gates of their own for each task: components of different adapters have nothing to do with each other.
        "row" has one mask of the outputs, shared.

    Args:
        safe: None where the base model is the aligned one.
    """

    def __init__(
        self, name: str, safe: Factors | None, tasks: Sequence[Factors], granularity: Granularity, options: FuseOptions
    ) -> None:
        super().__init__(name, options)
        self.granularity, self.tasks = granularity, len(tasks)
        given = [*([safe] if safe is not None else []), *tasks]
        dtype, device = self._dtype(*(f.a for f in given)), given[0].a.device
        self.has_safe = safe is not None
        self.ranks = [f.a.shape[0] for f in given]
        self.register_buffer("a", torch.cat([f.a.detach().to(device, dtype) for f in given]), persistent=False)
        self.register_buffer(
            "b", torch.cat([f.scaling * f.b.detach().to(device, dtype) for f in given], dim=1), persistent=False
        )
        (_, n), m = self.get_buffer("a").shape, self.get_buffer("b").shape[0]
        ranks = self.ranks[self.has_safe :]
        if granularity == "row":
            self.shapes, self.covers = {f"{name}.rows": (m, 1)}, {f"{name}.rows": sum(ranks)}
        elif granularity in ("rank", "module"):
            self.shapes = {f"{name}.task_{i}": (r,) if granularity == "rank" else (1,) for i, r in enumerate(ranks)}
            self.covers = {
                f"{name}.task_{i}": (m + n) * (1 if granularity == "rank" else r) for i, r in enumerate(ranks)
            }
            for i, (x, y) in enumerate(zip(self._parts("a"), self._parts("b"), strict=True)):
                self.register_buffer(f"gram_{i}", (y.mT @ y) * (x @ x.mT), persistent=False)
        else:
            raise ConfigError(
                f"{name}: granularity='element' needs adapters that were trained on from the safe one. Use rank, row "
                "or module."
            )

    def _parts(self, kind: str) -> list[Tensor]:
        """The tasks' factors, scaled."""
        found = (
            self.get_buffer("a").split(self.ranks) if kind == "a" else self.get_buffer("b").split(self.ranks, dim=1)
        )
        return list(found[self.has_safe :])

    def _masked(self, index: int, b: Tensor, masks: Masked) -> Tensor:
        if self.granularity == "row":
            return self._rows(index, b, masks[f"{self.name}.rows"].to(b))
        gate = rescaled_gate(
            masks[f"{self.name}.task_{index}"].to(b), self.get_buffer(f"gram_{index}"), self.options.rescale
        )
        return b * gate

    def _rows(self, index: int, b: Tensor, mask: Tensor) -> Tensor:
        if self.options.rescale != "norm":
            return rescaled(b, mask, self.options.rescale)
        root = torch.linalg.qr(self._parts("a")[index].mT, mode="r").R.mT  # ||B A|| = ||B R^T||
        full, masked = (torch.linalg.vector_norm(x @ root) for x in (b, b * mask))
        return b * mask * length_ratio(full, masked)

    def factors(self, masks: Masked | None) -> tuple[Tensor, Tensor]:
        weights = self.options.weights_of(self.tasks)
        tasks = [
            w * (b if masks is None else self._masked(i, b, masks))
            for i, (w, b) in enumerate(zip(weights, self._parts("b"), strict=True))
        ]
        safe = self.get_buffer("b")[:, : self.ranks[0]] if self.has_safe else None
        return self.get_buffer("a"), torch.cat([*([] if safe is None else [safe]), *tasks], dim=1)

    def dense(self) -> Tensor:
        """The whole update `(m, n)` under DARE or TIES, which leave no low rank."""
        a, b = self.aligned()
        vectors = [y @ x for x, y in zip(self._parts("a"), self._parts("b"), strict=True)]
        return b @ a + combine(vectors, self.options, self.name)

    def aligned(self) -> tuple[Tensor, Tensor]:
        r = self.ranks[0] if self.has_safe else 0
        return self.get_buffer("a")[:r], self.get_buffer("b")[:, :r]


def dense_tensor(
    safe: Tensor, vectors: Sequence[Tensor], mask: Tensor | None, options: FuseOptions, name: str
) -> Tensor:
    """One full weight: `theta_s + F(masked V_i)`, in the dtype of the vectors."""
    masked = vectors if mask is None else [rescaled(v, mask.to(v), options.rescale) for v in vectors]
    return safe.to(masked[0].dtype) + combine(masked, options, name)


@torch.no_grad()
def recompressed(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best approximation of `B A` of this rank: two thin QR and one small SVD, in fp64; nothing of size `m x n` is
    made.

    Args:
        a: `(r, n)`. b: `(m, r)`.

    Returns:
        `A' (k, n)`, `B' (m, k)` with `k = min(rank, r, m, n)`, in the dtype of the inputs, and `||B' A' - B A||_F /
        ||B A||_F`.
    """
    left, right = torch.linalg.qr(b.double()), torch.linalg.qr(a.double().mT)
    u, s, vh = torch.linalg.svd(left.R @ right.R.mT, full_matrices=False)
    k = min(rank, s.numel())
    root = s[:k].sqrt()
    total = float(torch.linalg.vector_norm(s))
    error = float(torch.linalg.vector_norm(s[k:])) / total if total > 0 else 0.0
    return (root[:, None] * (vh[:k] @ right.Q.mT)).to(a.dtype), ((left.Q @ u[:, :k]) * root).to(b.dtype), error
