"""`x W^T` of a packed NF4 weight for few rows x, in parts of the columns. Twin, together with
`triton_finish.py`: `reference.nf4_skinny`.

The values of a block share a scale, so `x W^T = sum_blocks scale * (x code^T)`: codes are multiplied in 16 bits as
they are, and a scale once for each block and row. A byte holds two values; `pairs` has both as one word, and the even
and odd columns of x are multiplied apart, so that nothing has to be interleaved.

Traffic: the packed weight alone, 0.5 bytes a value (8.4 MB of 4096 x 4096, 2.0 us at 4.3 TB/s) against 4.5 bytes
where it is dequantized first. x (t k values) is read by every tile of rows, from the cache; the parts' fp32 sums are
`8 t n parts` bytes, at most a quarter of the weight (`SUM_SHARE`). One row of x leaves tensor cores 1/16 full.
With the rows of A among its tiles it was measured on an H200, at a twentieth of its floor.
"""

from __future__ import annotations

import triton
import triton.language as tl

from peft_safety.ops.triton_common import block_scales, dot


@triton.jit
def partial_kernel(
    partial, x, wq, absmax, absmax2, code2, offset, pairs, n, k, t, split_chunks,
    BLOCKSIZE: tl.constexpr, BLOCK2: tl.constexpr, NESTED: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    BT: tl.constexpr, UNROLL: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """`partial[s] (t, n)`: the product over the s-th part of the columns (`split_chunks` chunks of `BK`), fp32."""
    part = tl.program_id(1)
    token = tl.arange(0, BT)
    chunk_start = part * split_chunks
    chunk_stop = tl.minimum(chunk_start + split_chunks, k // BK)
    sums = tl.zeros((BN, BT), dtype=tl.float32)
    half = tl.arange(0, BK // 2)
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = row < n
    wide = row.to(tl.int64)
    for group in range(chunk_start, chunk_stop, UNROLL):
        for step in tl.static_range(UNROLL):
            # past the part's end the last chunk is read again, and meets zeros for x
            chunk = tl.minimum(group + step, chunk_stop - 1)
            pair = (group + step) * (BK // 2) + half
            byte_place = wide[:, None] * (k // 2) + (chunk * (BK // 2) + half)[None, :]
            byte = tl.load(wq + byte_place, mask=inside[:, None], other=0)
            both = tl.load(pairs + byte.to(tl.int32))
            low = (both & 0xFFFF).to(tl.uint16).to(x.dtype.element_ty, bitcast=True)
            high = ((both >> 16) & 0xFFFF).to(tl.uint16).to(x.dtype.element_ty, bitcast=True)
            source = x + token[None, :] * k + 2 * pair[:, None]
            mask = (token < t)[None, :] & (pair < chunk_stop * (BK // 2))[:, None]
            product = dot(low, tl.load(source, mask=mask, other=0.0), tl.zeros((BN, BT), dtype=tl.float32), WIDEN)
            product = dot(high, tl.load(source + 1, mask=mask, other=0.0), product, WIDEN)
            index = wide * (k // BLOCKSIZE) + chunk * BK // BLOCKSIZE
            sums += product * block_scales(absmax, absmax2, code2, offset, index, inside, NESTED, BLOCK2)[:, None]
    place = (part * t + token)[None, :].to(tl.int64) * n + row[:, None]
    tl.store(partial + place, sums, mask=inside[:, None] & (token < t)[None, :])
