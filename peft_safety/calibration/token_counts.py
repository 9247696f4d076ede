"""The inputs of an embedding are tokens, as unit vectors: their second moment is diagonal, its entries are counts."""

from __future__ import annotations

import torch
from torch import Tensor

from peft_safety.calibration.batches import Counted
from peft_safety.calibration.positions import all_count, positions_of
from peft_safety.calibration.token_rows import wide


class TokenCounts:
    """How often each token of a vocabulary counts, with what is asked of a moment `S (n, n)`, which is never made."""

    def __init__(self, vocabulary: int, device: torch.device) -> None:
        self.counts = torch.zeros(vocabulary, dtype=wide(device), device=device)
        self.shape = torch.Size((vocabulary, vocabulary))
        self.device, self.dtype = device, self.counts.dtype

    def add(self, ids: Tensor) -> None:
        self.counts += torch.bincount(ids.reshape(-1), minlength=len(self.counts)).to(self.counts)

    def isfinite(self) -> Tensor:
        return self.counts.isfinite()

    def diagonal(self) -> Tensor:
        return self.counts

    def tokens(self) -> Tensor:
        """Those that were seen, the most frequent first, `(k,)`."""
        order = self.counts.argsort(descending=True, stable=True)
        return order[: int((self.counts > 0).sum())]


def counted_ids(ids: Tensor, which: Counted) -> Tensor:
    """The tokens `(count,)` of an embedding's input at the positions that count, all if it has other positions."""
    chosen = positions_of(ids.shape, which)
    if chosen is None:
        return ids.reshape(-1) if all_count(which) else ids.reshape(-1)[:0]
    return ids[chosen.to(ids.device)]
