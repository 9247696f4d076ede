"""`z = x A^T (t, r)` of 16-bit x and an fp32 A, to the rounding of fp32. Twin: `reference.lora_z`.

A is blind: `A q = 0` for the protected directions. Rounded to bf16 it is so to 1e-3 of its length only, so the product
has to be that of the fp32 A. An fp32 number has 24 bits and a bf16 number 8, so `A = A1 + A2 + A3` exactly, each term
the rest rounded to bf16 (down to the smallest normal numbers). A product of two bf16 numbers is exact in fp32, so
three products on tensor cores, summed in fp32, are that of x with A. fp16 has too small a range for its rests; there,
and where A is in 16 bits of another kind, both sides are widened to fp32.

Tensor cores truncate when they add to an accumulator, which makes every sum a little too short. So they sum the three
terms of one chunk of columns, and an fp32 addition, which rounds to nearest, adds the chunk to the others. With one
accumulator for all columns the error on an H200 was 1.2e-5 of the largest value (k = 4096), which truncation explains
(`tests/ops/interpreted.py` emulates it). The present form has not run on a GPU.

Traffic: x once, `2 t k` bytes, 33.5 MB for 4,096 x 4,096 or 7.8 us at 4.3 TB/s, and for each `BT` rows of x once A,
from the cache. Converting x first reads and writes `10 t k` bytes. Arithmetic: `6 t k r`, 1.6 GFLOP at r = 16, 2 us.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dot(left, right, sums, WIDEN: tl.constexpr):
    """`sums + left right` in fp32. `WIDEN` converts 16-bit operands first: bf16 cannot be multiplied in the
    interpreter, nor 16 bits with fp32.
    """
    if WIDEN:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, sums, input_precision="ieee")


@triton.jit
def z_kernel(
    z, x, a, k, r, t, BT: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, TERMS: tl.constexpr, WIDEN: tl.constexpr
):  # fmt: skip
    """`BT` rows and `BR` ranks of z. `TERMS` (1 or 3): how many terms in the dtype of x stand for a value of A."""
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    rank = tl.program_id(1) * BR + tl.arange(0, BR)
    sums = tl.zeros((BT, BR), dtype=tl.float32)
    for start in range(0, k, BK):
        column = start + tl.arange(0, BK)
        x_mask, a_mask = (token < t)[:, None] & (column < k)[None, :], (column < k)[:, None] & (rank < r)[None, :]
        left = tl.load(x + token[:, None].to(tl.int64) * k + column[None, :], mask=x_mask, other=0.0)
        right = tl.load(a + rank[None, :].to(tl.int64) * k + column[:, None], mask=a_mask, other=0.0)
        if TERMS == 1:
            sums = dot(left, right, sums, WIDEN)
        else:
            chunk = tl.zeros((BT, BR), dtype=tl.float32)
            for _ in tl.static_range(TERMS - 1):
                term = right.to(x.dtype.element_ty)
                chunk = dot(left, term, chunk, WIDEN)
                right = right - term.to(tl.float32)
            sums += dot(left, right.to(x.dtype.element_ty), chunk, WIDEN)
    place = token[:, None].to(tl.int64) * r + rank[None, :]
    tl.store(z + place, sums.to(z.dtype.element_ty), mask=(token < t)[:, None] & (rank < r)[None, :])
