"""What masks do to one LoRA module: they give the factors of the fused update. Training and export share this code."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from peft_safety.core.plain_lora import Factors
from peft_safety.errors import ConfigError
from peft_safety.methods.somf.masks import Granularity, Rescale, Shape, mask_shape, rescaled

MaskOf = Callable[[str], Tensor]
"""From a mask's full name to an exported mask, or to a sample of a training step."""
Task = tuple[float, Factors]
"""Weight and factors of one task's module."""


def task_arithmetic(vectors: Sequence[tuple[float, Tensor]]) -> Tensor:
    """`V = sum_i w_i V_i` (arXiv 2212.04089). All tasks share one mask m, and `sum_i w_i (m V_i) = m V`."""
    return torch.stack([weight * vector for weight, vector in vectors]).sum(dim=0)


class Update(nn.Module):
    """The fused update `B A` of one module, the safe adapter's factors first; and the shapes of the masks it needs."""

    a: Tensor
    b: Tensor
    mask_shapes: dict[str, Shape]

    def __init__(self, safe_rank: int, rescale: Rescale, **tensors: Tensor) -> None:
        super().__init__()
        self.safe_rank, self.rescale = safe_rank, rescale
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def factors(self, mask_of: MaskOf | None) -> tuple[Tensor, Tensor]:
        """`(A (r, n), B (m, r))` under these masks (None keeps everything), differentiable in them."""
        raise NotImplementedError

    def aligned(self) -> tuple[Tensor, Tensor]:
        return self.a[: self.safe_rank], self.b[:, : self.safe_rank]


class Continued(Update):
    """Tasks that started from the safe adapter: `A = A_s + masked(V_A)`, B likewise (arXiv 2405.09055, section 3)."""

    vector_a: Tensor
    vector_b: Tensor

    def __init__(
        self, name: str, safe: Factors, tasks: Sequence[Task], granularity: Granularity, rescale: Rescale
    ) -> None:
        a, b, s = _working(safe.a), _working(safe.b), safe.scaling
        vector_a = task_arithmetic([(weight, task.a.detach().to(a) - a) for weight, task in tasks])
        vector_b = task_arithmetic([(weight, task.b.detach().to(b) - b) for weight, task in tasks])
        super().__init__(len(a), rescale, a=a, b=s * b, vector_a=vector_a, vector_b=s * vector_b)
        if granularity in ("element", "row"):
            self.mask_shapes = {f"{name}.lora_{k}": mask_shape(x, granularity) for k, x in (("A", a), ("B", b))}
        else:
            self.mask_shapes = {f"{name}.{granularity}": (len(a) if granularity == "rank" else 1,)}

    def factors(self, mask_of: MaskOf | None) -> tuple[Tensor, Tensor]:
        a, b = self.vector_a, self.vector_b
        if mask_of is not None:
            masks = [mask_of(key).to(a.device) for key in self.mask_shapes]
            mask_a, mask_b = masks if len(masks) == 2 else (masks[0][:, None], masks[0])
            a, b = rescaled(a, mask_a, self.rescale), rescaled(b, mask_b, self.rescale)
        return self.a + a, self.b + b


class Independent(Update):
    """Other tasks: `A = [A_s; A_1; ...]`, `B = [s B_s, masked([w_1 s_1 B_1, ...])]`, an exact LoRA of the summed rank.
    "rank" has a gate for every component of every task, "module" one for every task, "row" one for every output.
    """

    def __init__(
        self, name: str, safe: Factors | None, tasks: Sequence[Task], granularity: Granularity, rescale: Rescale
    ) -> None:
        if granularity == "element":
            raise ConfigError(f"{name}: granularity='element' needs continued adapters. Use rank, row or module.")
        terms = [*([(1.0, safe)] if safe else []), *tasks]
        device = terms[0][1].a.device
        a = torch.cat([_working(factor.a).to(device) for _, factor in terms])
        b = torch.cat([w * factor.scaling * _working(factor.b).to(device) for w, factor in terms], dim=1)
        super().__init__(len(safe.a) if safe else 0, rescale, a=a, b=b)
        ranks = torch.tensor([len(task.a) for _, task in tasks])
        self.ranks = ranks if granularity == "module" else None
        entries = {"row": (len(b), 1), "rank": (int(ranks.sum()),), "module": (len(tasks),)}
        self.mask_shapes = {f"{name}.{granularity}": entries[granularity]}

    def factors(self, mask_of: MaskOf | None) -> tuple[Tensor, Tensor]:
        if mask_of is None:
            return self.a, self.b
        (name,) = self.mask_shapes
        mask = mask_of(name).to(self.b.device)
        if self.ranks is not None:
            mask = mask.repeat_interleave(self.ranks.to(mask.device))
        safe, tasks = self.b[:, : self.safe_rank], self.b[:, self.safe_rank :]
        return self.a, torch.cat([safe, rescaled(tasks, mask, self.rescale)], dim=1)


def _working(factor: Tensor) -> Tensor:
    return factor.detach().to(torch.promote_types(factor.dtype, torch.float32))
