"""Which rows of a layer's input count: those at the positions of a batch that count."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peft_safety.calibration.batches import Counted
from peft_safety.errors import CalibrationError


def positions_of(lead: Sequence[int], which: Counted) -> Tensor | None:
    """Which rows of a layer's input count, bool of the shape `lead`; None where the rows are not positions of the
    batch.

    Args:
        lead: `(batch, tokens)`, also flattened, or with further dimensions (heads) after or between them; or
            `(batch,)` of a pooled input, which counts if any position of its sequence does.
    """
    for mask in which.masks:
        batch, tokens = mask.shape
        if tuple(lead) == (mask.numel(),):
            return mask.reshape(-1)
        if len(lead) > 1 and lead[0] == batch and tokens in lead[1:]:
            axis = 1 + list(lead[1:]).index(tokens)
            return mask.view(batch, *(tokens if i == axis else 1 for i in range(1, len(lead)))).expand(*lead)
    if which.others is None and len(lead) >= 1 and lead[0] == which.masks[0].shape[0]:
        # pooled, or the patches of an image: by sequence
        chosen = torch.stack([mask.any(dim=1) for mask in which.masks]).any(dim=0)
        return chosen.view(-1, *(1 for _ in lead[1:])).expand(*lead)
    return None


def all_count(which: Counted) -> bool:
    """Whether rows that are not positions of the batch count."""
    return any(bool(mask.any()) for mask in which.masks) if which.others is None else which.others


def selected(name: str, x: Tensor, which: Counted) -> Tensor:
    """The rows of `x (..., features)` that count, `(rows, features)`, fp32; all where they are not positions of the
    batch (routed experts, patches of images, frames). A CalibrationError refuses what is no tensor.
    """
    return placed_rows(name, x, which)[0]


def placed_rows(name: str, x: Tensor, which: Counted) -> tuple[Tensor, bool]:
    """`selected`, and whether the rows were chosen by position."""
    if not isinstance(x, Tensor) or x.ndim < 1:
        raise CalibrationError(f"{name}: a {type(x).__name__} is no rows of features. Leave it out of target_modules.")
    rows, chosen = x.detach().reshape(-1, x.shape[-1]), positions_of(x.shape[:-1], which)
    if chosen is None:
        return (rows if all_count(which) else rows[:0]).float(), False
    return rows[chosen.reshape(-1).to(x.device)].float(), True
