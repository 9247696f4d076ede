"""The Triton kernels, launched by `triton_backend.py`, each with its twin in `reference.py`. One source for Triton 3.6
to 3.9, compiled or interpreted: no inline assembly, no autotuning. Sizes that end inside a tile are masked here.
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
    """`sums + left right` in fp32. `WIDEN` converts bf16 operands first, which the interpreter cannot multiply."""
    if WIDEN:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, sums, input_precision="ieee")


@triton.jit
def weight_kernel(
    out, wq, absmax, absmax2, code2, offset, code, a, bp, scale, n, k, r,
    BLOCKSIZE: tl.constexpr, BLOCK2: tl.constexpr, NESTED: tl.constexpr, HAS_LORA: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, BR: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """`out (n, k) = W`, or `W + scale * B' A` with factors `(r, k)` and `(n, r)`: a tile of `(BN, BK)`, rounded once.
    `code` are the 16 values of NF4, fp32, in cached memory: 15 selects a value would be more arithmetic.
    """
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
    if HAS_LORA:
        delta = tl.zeros((BN, BK), dtype=tl.float32)
        for done in range(0, r, BR):
            rank = done + tl.arange(0, BR)
            b_mask, a_mask = inside[:, None] & (rank < r)[None, :], (rank < r)[:, None] & (column < k)[None, :]
            left = tl.load(bp + row[:, None] * r + rank[None, :], mask=b_mask, other=0.0)
            right = tl.load(a + rank[:, None].to(tl.int64) * k + column[None, :], mask=a_mask, other=0.0)
            delta = dot(left, right, delta, WIDEN)
        value = value + delta * scale
    mask = inside[:, None] & (column < k)[None, :]
    tl.store(out + row[:, None] * k + column[None, :], value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def partial_kernel(
    partial, x, xa, wq, absmax, absmax2, code2, offset, pairs, a, n, k, r, t, split_chunks,
    BLOCKSIZE: tl.constexpr, BLOCK2: tl.constexpr, NESTED: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    BT: tl.constexpr, UNROLL: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """`partial[s] (t, n + r) = x [W; A]^T` over the s-th part of the columns (`split_chunks` chunks of `BK`), fp32;
    the rows of A are further tiles. `pairs`: for each byte its two values in the dtype of x, as one 32-bit word.
    """
    pid = tl.program_id(0)
    part = tl.program_id(1)
    token = tl.arange(0, BT)
    chunk_start = part * split_chunks
    chunk_stop = tl.minimum(chunk_start + split_chunks, k // BK)
    sums = tl.zeros((BN, BT), dtype=tl.float32)
    tiles = tl.cdiv(n, BN)
    half = tl.arange(0, BK // 2)
    if pid < tiles:
        row = pid * BN + tl.arange(0, BN)
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
        place = (part * t + token)[None, :].to(tl.int64) * (n + r) + row[:, None]
        tl.store(partial + place, sums, mask=inside[:, None] & (token < t)[None, :])
    else:
        rank = (pid - tiles) * BN + tl.arange(0, BN)
        column = tl.arange(0, BK)
        for chunk in range(chunk_start, chunk_stop):
            a_place = rank[:, None].to(tl.int64) * k + (chunk * BK + column)[None, :]
            x_place = token[None, :] * k + (chunk * BK + column)[:, None]
            left = tl.load(a + a_place, mask=(rank < r)[:, None], other=0.0)
            right = tl.load(xa + x_place, mask=(token < t)[None, :], other=0.0)
            sums = dot(left, right, sums, WIDEN)
        place = (part * t + token)[None, :].to(tl.int64) * (n + r) + n + rank[:, None]
        tl.store(partial + place, sums, mask=(rank < r)[:, None] & (token < t)[None, :])


@triton.jit
def summed(partial, first, row, inside, token, n, r, t, parts, BN: tl.constexpr, BT: tl.constexpr):
    """`(BN, BT)`: rows `first + row` of `[W; A] x^T`, over all parts of the columns, in their order."""
    sums = tl.zeros((BN, BT), dtype=tl.float32)
    for part in range(parts):
        place = (part * t + token)[None, :].to(tl.int64) * (n + r) + first + row[:, None]
        sums += tl.load(partial + place, mask=inside[:, None] & (token < t)[None, :], other=0.0)
    return sums


@triton.jit
def finish_kernel(
    y, z, partial, bp, scale, n, r, t, parts, BN: tl.constexpr, BT: tl.constexpr, BR: tl.constexpr, WIDEN: tl.constexpr
):  # fmt: skip
    """`y (t, n) = sum_s x W^T + scale * z B'^T` with `z (t, r) = x A^T`, which the first program also stores."""
    pid = tl.program_id(0)
    token = tl.arange(0, BT)
    row = pid * BN + tl.arange(0, BN)
    inside = row < n
    delta = tl.zeros((BN, BT), dtype=tl.float32)
    for done in range(0, r, BR):
        rank = done + tl.arange(0, BR)
        rounded = summed(partial, n, rank, rank < r, token, n, r, t, parts, BR, BT).to(z.dtype.element_ty)
        if pid == 0:
            tl.store(z + token[None, :] * r + rank[:, None], rounded, mask=(rank < r)[:, None] & (token < t)[None, :])
        mask = inside[:, None] & (rank < r)[None, :]
        left = tl.load(bp + row[:, None].to(tl.int64) * r + rank[None, :], mask=mask, other=0.0)
        delta = dot(left, rounded, delta, WIDEN)
    total = summed(partial, 0, row, inside, token, n, r, t, parts, BN, BT) + delta * scale
    place = token[None, :].to(tl.int64) * n + row[:, None]
    tl.store(y + place, total.to(y.dtype.element_ty), mask=inside[:, None] & (token < t)[None, :])
