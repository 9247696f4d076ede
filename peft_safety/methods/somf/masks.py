"""Learned masks: from logits to a relaxed sample for training, and to a fixed mask for export. Pure functions, torch
only.

One mask is shared by all tasks. A logit `l` keeps an entry with probability `sigmoid(l)`; training sees a concrete
(Gumbel-sigmoid) sample of that, in (0, 1), through which gradients flow.

Reference: Yi et al., SOMF, arXiv 2405.09055; concrete distribution: Maddison et al., arXiv 1611.00712.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from peft_safety.errors import ArtifactError, ConfigError
from peft_safety.methods.somf.fusions import stream

Granularity = Literal["element", "row", "rank", "module"]
Rescale = Literal["mean", "none", "norm"]
Export = Literal["threshold", "topk", "sample", "soft"]
SOFT_LEVELS = 255
"""Steps of a keep probability that is stored in 8 bits."""


def concrete(logit: Tensor, u: Tensor, temperature: float) -> Tensor:
    """`m = sigmoid((l + log u - log(1 - u)) / tau)`.

    Args:
        logit: any shape.
        u: uniform noise in (0, 1), of that shape.
    """
    return torch.sigmoid((logit + torch.logit(u)) / temperature)


def noise(like: Tensor, seed: int) -> Tensor:
    """Uniform noise strictly inside (0, 1), the same for the same seed on one kind of device: it can be drawn again
    instead of kept for the backward pass.
    """
    generator = torch.Generator(device=like.device).manual_seed(seed)
    tiny = torch.finfo(like.dtype).eps / 2
    return torch.rand(like.shape, generator=generator, device=like.device, dtype=like.dtype).clamp_(tiny, 1 - tiny)


def rescaled(vector: Tensor, mask: Tensor, how: Rescale) -> Tensor:
    """The masked task vector `V m`, scaled so that less is not also shorter.

    Args:
        vector: `V`, any shape.
        mask: broadcasts to it evenly (each of its entries covers equally many of V's).
        how: "mean" divides by the mean of m, as published (it lengthens a real task vector 1.4 to 1.8 times); "norm"
            restores `||V||`; "none" leaves it. A mask that keeps nothing gives zero.
    """
    masked = vector * mask
    tiny = torch.finfo(masked.dtype).tiny
    if how == "mean":
        return masked / mask.mean().clamp(min=tiny)
    if how == "norm":
        return masked * length_ratio(torch.linalg.vector_norm(vector), torch.linalg.vector_norm(masked))
    return masked


def length_ratio(before: Tensor, after: Tensor) -> Tensor:
    """`before / after`, finite where nothing is left."""
    limits = torch.finfo(before.dtype)
    return before / torch.maximum(after, (limits.eps * before.detach()).clamp(min=limits.tiny))


def rescaled_gate(gate: Tensor, gram: Tensor, how: Rescale) -> Tensor:
    """`rescaled` for a gate on rank components: `dW = B diag(g) A`, of which only the gate is scaled.

    Args:
        gate: `g (r,)`, or `(1,)` for a whole module.
        gram: `(B^T B) * (A A^T) (r, r)`, so that `||B diag(g) A||_F^2 = g^T G g`.
    """
    tiny = torch.finfo(gate.dtype).tiny
    if how == "mean":
        return gate / gate.mean().clamp(min=tiny)
    if how == "norm":
        full = gate.expand(gram.shape[0])
        return gate * length_ratio(gram.sum().clamp(min=0).sqrt(), (full @ gram @ full).clamp(min=tiny).sqrt())
    return gate


def initial_logit(density: float) -> float:
    """The logit that keeps an entry with this probability."""
    return math.log(density) - math.log1p(-density)


def expected_density(logits: Mapping[str, Tensor], covers: Mapping[str, int]) -> Tensor:
    """Expected share of kept entries, `sum_k c_k sum sigmoid(l_k) / sum_k c_k n_k`: differentiable, so that a target
    can be asked for.

    Args:
        covers: by name, how many entries of the task vector one logit decides.
    """
    kept = torch.stack([covers[name] * torch.sigmoid(logit).sum() for name, logit in logits.items()]).sum()
    return kept / sum(covers[name] * logit.numel() for name, logit in logits.items())


@dataclass(frozen=True)
class Masks:
    """Fixed masks by name, in at most 8 bits an entry.

    Attributes:
        values: uint8, from 0 (dropped) to `levels` (kept).
        levels: 1 for hard masks, 255 for keep probabilities.
        record: where they come from: plain JSON values.
    """

    values: dict[str, Tensor]
    levels: int = 1
    record: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        """The mask of this name as fp32 in [0, 1].

        Raises:
            ArtifactError: there is none.
        """
        if name not in self.values:
            raise ArtifactError(
                f"{name}: the masks have no entry of this name ({len(self.values)} others). Use masks that were "
                "trained on these modules."
            )
        return self.values[name].float() / self.levels

    def __iter__(self) -> Iterator[str]:
        return iter(self.values)

    def density(self, covers: Mapping[str, int] | None = None) -> float:
        """Share of kept entries; see `expected_density` for `covers` (default: every entry of a mask counts once)."""
        sizes = {name: (covers or {}).get(name, 1) for name in self.values}
        total = sum(sizes[name] * value.numel() for name, value in self.values.items())
        return sum(sizes[name] * float(value.sum(dtype=torch.float64)) for name, value in self.values.items()) / (
            self.levels * total
        )

    def shuffled(self, seed: int = 0) -> Masks:
        """The control: the same number of kept entries in every mask, at random places. Masks of a single entry are
        shuffled among each other.
        """
        lone = [name for name, value in self.values.items() if value.numel() == 1]
        order = torch.randperm(len(lone), generator=torch.Generator().manual_seed(stream(seed, "control"))).tolist()
        found = {name: self.values[lone[index]] for name, index in zip(lone, order, strict=True)}
        for name, value in self.values.items():
            if name not in found:
                generator = torch.Generator().manual_seed(stream(seed, "control", name))
                found[name] = value.flatten()[torch.randperm(value.numel(), generator=generator)].view(value.shape)
        return Masks({name: found[name] for name in self.values}, self.levels, {**self.record, "control": seed})


@torch.no_grad()
def export(
    logits: Mapping[str, Tensor],
    how: Export,
    *,
    density: float | None = None,
    seed: int = 0,
    record: Mapping[str, Any] | None = None,
) -> Masks:
    """Fixed masks from trained logits. The same logits give the same bits, "sample" included.

    Args:
        how: "threshold" keeps `l > 0` (more likely kept than not); "topk" the `round(density n)` largest of each mask
            (masks of a single entry compete with each other); "sample" a seeded Bernoulli draw, as the reference code
            exports, which never seeds it; "soft" the keep probabilities in 8 bits.
        density: for "topk".

    Raises:
        ConfigError: "topk" without a density.
    """
    facts = {**(record or {}), "export": how}
    plain = {name: logit.detach().cpu().float() for name, logit in logits.items()}
    if how == "soft":
        return Masks(
            {name: (SOFT_LEVELS * torch.sigmoid(x)).round().to(torch.uint8) for name, x in plain.items()},
            SOFT_LEVELS,
            facts,
        )
    if how == "threshold":
        return Masks({name: (x > 0).to(torch.uint8) for name, x in plain.items()}, 1, facts)
    if how == "sample":
        drawn = {
            name: (x + torch.logit(noise(x, stream(seed, "sample", name))) > 0).to(torch.uint8)
            for name, x in plain.items()
        }
        return Masks(drawn, 1, {**facts, "seed": seed})
    if density is None:
        raise ConfigError("export='topk' needs a density. Give export_density in (0, 1).")
    lone = [name for name, x in plain.items() if x.numel() == 1]
    kept = (
        dict(zip(lone, _largest(torch.cat([plain[name].flatten() for name in lone]), density).split(1), strict=True))
        if lone
        else {}
    )
    found = {
        name: (kept[name] if name in kept else _largest(x.flatten(), density)).view(x.shape)
        for name, x in plain.items()
    }
    return Masks(found, 1, {**facts, "export_density": density})


def _largest(values: Tensor, density: float) -> Tensor:
    """1 where a value is among the `round(density n)` largest; the earlier of equals first."""
    order = torch.sort(values, descending=True, stable=True).indices
    found = torch.zeros(values.shape, dtype=torch.uint8)
    found[order[: round(density * values.numel())]] = 1
    return found
