"""The forms in which PEFT stores two factors: those of a linear layer, of a convolution and of an embedding.

`lora_A (r, channels, *kernel)` and `lora_B (out, r / groups, 1, ...)` of a convolution are matrices `(r, n)` and
`(out, r)` here; where there are groups, `lora_B` is block-diagonal. An embedding has `lora_embedding_A` and
`lora_embedding_B`, without ".weight".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peft_safety.core import kinds

KEYS = {"A.weight": "A", "B.weight": "B", "embedding_A": "A", "embedding_B": "B"}
"""What follows `lora_` in the key of a factor, and which one it is."""
MAX_BLOCKS = 2**26
"""Numbers in a block-diagonal `lora_B`: a small file could ask for any amount of memory."""


@dataclass(frozen=True)
class Form:
    """`patch` is `(channels, *kernel)` of a convolution, empty for another layer."""

    patch: tuple[int, ...] = ()
    groups: int = 1
    embedding: bool = False

    @classmethod
    def of(cls, layer: Any) -> Form:
        """That of the factors on a base layer."""
        if kinds.is_convolution(layer):
            return cls((int(layer.in_channels), *layer.kernel_size), int(layer.groups))
        return cls(embedding=kinds.is_embedding(layer))

    @classmethod
    def stored_as(cls, a: Sequence[int], b: Sequence[int], embedding: bool) -> Form | None:
        """That of two tensors of these shapes, of a key with `embedding` in it or not; None if they fit no form."""
        if len(a) != len(b) or len(a) < 2 or 0 in (*a, *b) or (embedding and len(a) > 2) or len(a) > 5:
            return None
        groups = a[0] // b[1]
        whole = groups * b[1] == a[0] and b[0] % groups == 0 and all(size == 1 for size in b[2:])
        if not whole or (len(a) == 2 and groups != 1) or (groups > 1 and a[0] * b[0] > MAX_BLOCKS):
            return None
        return cls(tuple(a[1:]) if len(a) > 2 else (), groups, embedding)

    @property
    def is_linear(self) -> bool:
        return not self.patch and not self.embedding

    def key(self, module: str, factor: str) -> str:
        """The end of a key, from the module's name on; `factor` is "A" or "B"."""
        return f"{module}.lora_embedding_{factor}" if self.embedding else f"{module}.lora_{factor}.weight"

    def matrices(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """`(r, n)` and `(out, r)` of stored factors."""
        b = b.flatten(1)
        return a.flatten(1), b if self.groups == 1 else torch.block_diag(*b.chunk(self.groups))

    def stored(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `matrices`."""
        if not self.patch:
            return a, b
        rows, columns = len(b) // self.groups, len(a) // self.groups
        blocks = [b[i * rows : (i + 1) * rows, i * columns : (i + 1) * columns] for i in range(self.groups)]
        return a.reshape(len(a), *self.patch), torch.cat(blocks).reshape(len(b), columns, *[1] * (len(self.patch) - 1))


LINEAR = Form()
