"""Base layers other than linear ones, each as a linear map: a convolution of patches, an embedding of tokens.

PEFT's `lora_A` on a convolution is one itself, with the kernel, stride and padding of its base layer, but without its
groups, and padded by zeros. So its inputs are patches of `in_channels * prod(kernel)` numbers, and its weight
`(r, in_channels, *kernel)` is a matrix `(r, n)` of them; `lora_B` is a convolution of single positions. On an
embedding the inputs are tokens, `n` is the size of the vocabulary, and the rows of the weight `(n, m)` are outputs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from peft_safety.errors import UnsupportedLayerError

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
OUTSIDE_GROUP = 1e-12
"""Share of a column's energy outside of its group that is rounding."""


def is_convolution(layer: nn.Module) -> bool:
    return isinstance(layer, CONVOLUTIONS)


def is_embedding(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Embedding)


def shape(layer: Any) -> tuple[int, int] | None:
    """`(out_features, in_features)` of the linear map; None for any other layer."""
    if is_convolution(layer):
        return int(layer.out_channels), int(layer.in_channels) * math.prod(layer.kernel_size)
    return (int(layer.embedding_dim), int(layer.num_embeddings)) if is_embedding(layer) else None


def groups(layer: Any) -> int:
    """The number of groups of a convolution; 1 for any other layer."""
    return int(layer.groups) if is_convolution(layer) else 1


def in_groups(basis: Tensor, groups: int) -> bool:
    """Whether each column of `U (out, k)` lies in the channels of one group. `lora_B` of a grouped convolution is
    block-diagonal, and stays so only under such a projection.
    """
    energy = basis.square().unflatten(0, (groups, -1)).sum(1)
    return bool((energy.amax(0) >= (1 - OUTSIDE_GROUP) * energy.sum(0)).all())


def as_matrix(layer: Any, weight: Tensor) -> Tensor:
    """The weight of such a layer as `(out_features, in_features)`; that of a grouped convolution has zeros where a
    group does not see a channel.
    """
    if is_embedding(layer):
        return weight.T
    flat = weight.flatten(1)
    return flat if layer.groups == 1 else torch.block_diag(*flat.chunk(layer.groups))


def as_stored(layer: Any, matrix: Tensor) -> Tensor:
    """The inverse, for a layer without groups."""
    return matrix.T if is_embedding(layer) else matrix.reshape(layer.weight.shape)


def check(layer: Any, name: str) -> None:
    """An UnsupportedLayerError refuses a layer on which PEFT's `lora_A` has other inputs than the layer."""
    reason = _problem(layer)
    if reason is not None:
        what = f"{name}: this {type(layer).__name__}({layer.extra_repr()}) cannot be protected"
        raise UnsupportedLayerError(f"{what}: {reason}. Leave it out of target_modules.")


def _problem(layer: Any) -> str | None:
    if is_embedding(layer):
        return None if layer.max_norm is None else "max_norm rescales the rows of lora_A at each look-up"
    kind = next(kind for kind in CONVOLUTIONS if isinstance(layer, kind))
    own = [name for name in ("forward", "_conv_forward") if getattr(type(layer), name) is not getattr(kind, name)]
    if own or "forward" in vars(layer):
        return f"its {(own or ['forward'])[0]} is not that of {kind.__name__}, and lora_A is of its class"
    return None if set(layer.dilation) == {1} else "PEFT's lora_A has no dilation, so that its patches are others"


def merges_exactly(layer: Any) -> bool:
    """Whether `W + dW` would compute what the adapter beside `W` does."""
    return not is_convolution(layer) or layer.padding_mode == "zeros"
