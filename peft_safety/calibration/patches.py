"""The inputs of a convolution: at each of its output positions, a patch of `in_channels * prod(kernel)` numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_safety.calibration.batches import Counted
from peft_safety.calibration.positions import all_count, positions_of
from peft_safety.core.kinds import is_convolution

CHUNK = 1 << 22
"""Numbers of patches that are laid out at once: 16 MB in fp32."""


@dataclass(frozen=True)
class Patches:
    """How PEFT's `lora_A` on a convolution reads its inputs, see `core.kinds`; `padding` is before and after, by
    dimension.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, layer: Any) -> Patches | None:
        """None for a layer that is no convolution."""
        if not is_convolution(layer):
            return None
        if isinstance(layer.padding, str):
            same = layer.padding == "same"
            padding = tuple(((k - 1) // 2, k // 2) if same else (0, 0) for k in layer.kernel_size)
        else:
            padding = tuple((p, p) for p in layer.padding)
        return cls(tuple(layer.kernel_size), tuple(layer.stride), padding)

    def rows(self, x: Tensor, which: Counted) -> Iterator[Tensor]:
        """The patches `(positions, n)`, fp32, that count, a few million numbers at a time.

        Args:
            x: `(batch, channels, *space)`, or without the batch.
            which: the positions that count, see `positions_of`. The outputs of a sequence (one dimension of
                space) may line up with them; those of an image count if any position of its row does.
        """
        x = x.detach() if x.ndim == len(self.kernel) + 2 else x.detach()[None]
        for index, image in enumerate(x):
            windows = self._windows(image.float())
            lead = (len(x), len(windows)) if len(self.kernel) == 1 else (len(x),)
            chosen = positions_of(lead, which)
            if chosen is None:
                chosen = torch.tensor(all_count(which)).expand(lead)
            mask = chosen[index].to(x.device).expand(len(windows))
            if bool(mask.any()):
                yield from _blocks(windows, mask, len(self.kernel))

    def _windows(self, image: Tensor) -> Tensor:
        """A view `(*outputs, channels, *kernel)` of an image `(channels, *space)`."""
        padded = F.pad(image, [side for pair in reversed(self.padding) for side in pair])
        for dimension, (size, step) in enumerate(zip(self.kernel, self.stride, strict=True), 1):
            padded = padded.unfold(dimension, size, step)
        return padded.movedim(0, len(self.kernel))


def _blocks(windows: Tensor, mask: Tensor, dimensions: int) -> Iterator[Tensor]:
    """The rows of a view as they are laid out, of those of its first dimension that count."""
    size = windows[0].numel()
    if size > CHUNK and dimensions > 1:
        for plane, counts in zip(windows, mask, strict=True):
            yield from _blocks(plane, counts.expand(len(plane)), dimensions - 1)
        return
    step = max(1, CHUNK // size)
    for block, counted in zip(windows.split(step), mask.split(step), strict=True):
        if bool(counted.any()):
            rows = block[counted]
            yield rows.reshape(-1, rows.shape[dimensions:].numel())
