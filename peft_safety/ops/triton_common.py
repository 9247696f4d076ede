"""What several kernels share. One source for Triton 3.6 to 3.9, compiled or interpreted: no inline assembly, no
autotuning. Each kernel is in a file of its own, and its plain twin in `reference.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def block_scales(absmax, absmax2, code2, offset, index, mask, NESTED: tl.constexpr, BLOCK2: tl.constexpr):
    """fp32 scales of the blocks at `index`: product, then sum, each rounded, as bitsandbytes decodes them."""
    if NESTED:
        quantized = tl.load(absmax + index, mask=mask, other=0).to(tl.int32)
        scale = tl.load(code2 + quantized) * tl.load(absmax2 + index // BLOCK2, mask=mask, other=0.0) + tl.load(offset)
    else:
        scale = tl.load(absmax + index, mask=mask, other=0.0)
    return scale


@triton.jit
def dot(left, right, sums, WIDEN: tl.constexpr):
    """`sums + left right` in fp32. `WIDEN` converts 16-bit operands first: bf16 cannot be multiplied in the
    interpreter, nor 16 bits with fp32.
    """
    if WIDEN:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, sums, input_precision="ieee")
