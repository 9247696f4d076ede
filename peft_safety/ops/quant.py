"""A bitsandbytes NF4 weight as plain tensors, and the reasons why some weights are refused."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peft_safety.errors import OperationError

BLOCK_SIZES = tuple(2**power for power in range(5, 13))
"""Block sizes of bitsandbytes, in values."""


class QuantBundle(NamedTuple):
    """An NF4 weight `W (n, k)`, row-major, in blocks of `blocksize` values that share a scale; a row is a whole number
    of blocks.

    Attributes:
        wq: packed codes, uint8, `n * k / 2` bytes of any shape; the first of two values is in the high half of its
            byte.
        absmax: the scale of each block, `(n * k / blocksize,)`, fp32; or uint8 codes of them (double quantization).
        absmax2: fp32 scale of each block of `blocksize2` scale codes; None for plain scales, like the next two.
        code2: `(256,)` fp32, what a scale code stands for.
        offset: `()` fp32, added to every scale: `scale = code2[absmax] * absmax2 + offset`.
    """

    wq: Tensor
    absmax: Tensor
    absmax2: Tensor | None
    code2: Tensor | None
    offset: Tensor | None
    n: int
    k: int
    blocksize: int
    blocksize2: int

    @property
    def nested(self) -> bool:
        return self.absmax2 is not None


def from_linear4bit(layer: nn.Module) -> QuantBundle | str:
    """The NF4 weight of a bitsandbytes `Linear4bit`, not copied, or the reason why it is not supported."""
    weight: Any = getattr(layer, "weight", None)
    if type(layer).__name__ == "Linear8bitLt":
        return "an 8-bit weight, not NF4"
    state = getattr(weight, "quant_state", None)
    if not isinstance(weight, Tensor) or state is None:
        return "no 4-bit quantization state: a dense layer, or one that is not on its device yet"
    return from_quant_state(weight, state)


def from_quant_state(weight: Tensor, state: Any) -> QuantBundle | str:
    """A packed weight and its `QuantState` as a bundle that shares their memory, or the reason why not."""
    if state.quant_type != "nf4":
        return f"quant_type {state.quant_type!r}, not NF4"
    if getattr(state, "packing_format_for_cpu", False):
        return "repacked for AVX512 by bitsandbytes (it does so at the first forward in eval mode on a CPU)"
    if weight.dtype != torch.uint8:
        return f"quant_storage {weight.dtype}, not uint8"
    if weight.is_meta or hasattr(weight, "device_mesh") or not weight.is_contiguous():
        return "a weight on the meta device, sharded, or not contiguous"
    if state.shape is None or len(state.shape) != 2:
        return f"a weight of shape {None if state.shape is None else tuple(state.shape)}, not a matrix"
    n, k = map(int, state.shape)
    if state.blocksize not in BLOCK_SIZES:
        return f"a block size of {state.blocksize}, not a power of two from {BLOCK_SIZES[0]} to {BLOCK_SIZES[-1]}"
    if k % state.blocksize:
        return f"in_features {k} is not a multiple of the block size {state.blocksize}"
    blocks = n * k // state.blocksize
    if weight.numel() * 2 != n * k or state.absmax.numel() != blocks:
        return f"{weight.numel()} packed bytes and {state.absmax.numel()} scales for a {n} x {k} weight"
    packed, absmax, sizes = weight.detach(), state.absmax, (n, k, int(state.blocksize))
    if not state.nested:
        if absmax.dtype != torch.float32:
            return f"scales of {absmax.dtype}, not float32"
        return QuantBundle(packed, absmax, None, None, None, *sizes, 0)
    inner, size = state.state2, state.state2.blocksize
    dtypes = state.absmax.dtype, inner.absmax.dtype, inner.code.dtype
    if dtypes != (torch.uint8, torch.float32, torch.float32) or inner.code.numel() != 256:
        return f"quantized scales of {state.absmax.dtype} with a code of {inner.code.dtype}"
    if size < 1 or size & (size - 1) or inner.absmax.numel() != -(-blocks // size):
        return f"{inner.absmax.numel()} scales in blocks of {size} for {blocks} quantized scales"
    offset = torch.as_tensor(state.offset, dtype=torch.float32, device=weight.device)
    return QuantBundle(packed, absmax, inner.absmax, inner.code, offset, *sizes, int(size))


def require(bundle: QuantBundle | str, name: str = "the layer") -> QuantBundle:
    """The bundle, or an OperationError that says why there is none."""
    if isinstance(bundle, str):
        raise OperationError(f"{name}: {bundle}. Quantize it with bnb_4bit_quant_type='nf4', or use PEFT's own path.")
    return bundle
