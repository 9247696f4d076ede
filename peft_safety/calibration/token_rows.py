"""A second moment `S = X^T X` that is never made: where the data have fewer tokens than a layer has features."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK = 512
"""Tokens that are converted to fp64 at once."""


class TokenRows:
    """The inputs `X (tokens, n)` of a layer, with what `bases.input_basis` needs of `S`, in fp64 (fp32 on mps)."""

    def __init__(self, features: int, device: torch.device) -> None:
        self.parts: list[Tensor] = []
        self.shape = torch.Size((features, features))
        self.device = device
        self.dtype = wide(device)

    @property
    def tokens(self) -> int:
        return sum(part.shape[0] for part in self.parts)

    def add(self, x: Tensor) -> None:
        """Keep the rows `(tokens, n)`, in fp32."""
        self.parts.append(x.clone())

    def isfinite(self) -> Tensor:
        return torch.stack([part.isfinite().all() for part in self.parts])

    def diagonal(self) -> Tensor:
        total = torch.zeros(self.shape[0], dtype=self.dtype, device=self.device)
        for x in self._chunks():
            total += x.square().sum(0)
        return total

    def __matmul__(self, q: Tensor) -> Tensor:
        result = torch.zeros_like(q)
        for x in self._chunks():
            result.addmm_(x.mT, x @ q)
        return result

    def dense(self) -> Tensor:
        result = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        for x in self._chunks():
            result.addmm_(x.mT, x)
        return result

    def _chunks(self) -> Iterator[Tensor]:
        return (chunk.to(self.dtype) for part in self.parts for chunk in part.split(CHUNK))


def wide(device: torch.device) -> torch.dtype:
    """What moments are computed in."""
    return torch.float32 if device.type == "mps" else torch.float64
