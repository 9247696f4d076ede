"""`W (n, k)` of a packed NF4 weight, in the dtype of a product with it. Twin: `reference.nf4_dequant`.

`W[i, j] = code[c] * scale`, with the code `c` in four bits, and one scale for each block of a row, itself quantized or
not. Product and sum of a scale are rounded apart, and so is the product with the code, which gives bitsandbytes' bits.

Traffic: a value is read as 0.5 bytes, with 1/64 byte of its quantized scale, and written as 2 bytes (bf16). So a
weight of 4096 x 4096 moves 42 MB, 9.8 us at 4.3 TB/s, and no arithmetic comes near that. A tile's row of 64 values is
32 bytes of codes, one sector; its scales are read once for the tile. The 16 values of `code` stay in the cache.
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
def dequant_kernel(
    out, wq, absmax, absmax2, code2, offset, code, n, k,
    BLOCKSIZE: tl.constexpr, BLOCK2: tl.constexpr, NESTED: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A tile of `(BN, BK)`. Sizes that end inside a tile are masked."""
    across = tl.cdiv(k, BK)
    pid = tl.program_id(0)
    row = (pid // across) * BN + tl.arange(0, BN)
    first = (pid % across) * BK
    inside = row < n
    row = row.to(tl.int64)

    byte_column = first // 2 + tl.arange(0, BK // 2)
    mask = inside[:, None] & (byte_column < k // 2)[None, :]
    byte = tl.load(wq + row[:, None] * (k // 2) + byte_column[None, :], mask=mask, other=0).to(tl.int32)
    value = tl.interleave(tl.load(code + (byte >> 4)), tl.load(code + (byte & 15)))

    SHARED: tl.constexpr = BLOCKSIZE if BLOCKSIZE < BK else BK  # values of a tile's row that share a scale
    start = first + tl.arange(0, BK // SHARED) * SHARED
    index = row[:, None] * (k // BLOCKSIZE) + (start // BLOCKSIZE)[None, :]
    mask = inside[:, None] & (start < k)[None, :]
    scales = block_scales(absmax, absmax2, code2, offset, index, mask, NESTED, BLOCK2)
    value = tl.reshape(tl.reshape(value, (BN, BK // SHARED, SHARED)) * scales[:, :, None], (BN, BK))

    column = first + tl.arange(0, BK)
    mask = inside[:, None] & (column < k)[None, :]
    tl.store(out + row[:, None] * k + column[None, :], value.to(out.dtype.element_ty), mask=mask)
