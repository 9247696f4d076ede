"""`y = sum_s partial[s] + scale z B'^T`: the sums of `triton_partial.py` and the adapter. Twin: `reference.plus`.

Base and adapter meet in fp32 and are rounded once. z and B' are in one dtype; in fp32 their product is in fp32 too, so
that a row of z that is zero, because x lies in the protected span, adds nothing.

Traffic: `4 t n parts` bytes of sums, `n r` values of B', `t r` of z for every program, from the cache, and `2 t n`
written bytes. For one token, n = 4096, r = 16 in fp32 and 8 parts that is 0.4 MB, 0.1 us at 4.3 TB/s: less than
the launch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from peft_safety.ops.triton_common import dot


@triton.jit
def finish_kernel(
    y, z, partial, bp, scale, n, r, t, parts, BN: tl.constexpr, BT: tl.constexpr, BR: tl.constexpr, WIDEN: tl.constexpr
):  # fmt: skip
    """`BN` columns of `y (t, n)`."""
    token = tl.arange(0, BT)
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = row < n
    total = tl.zeros((BN, BT), dtype=tl.float32)
    for done in range(0, r, BR):
        rank = done + tl.arange(0, BR)
        z_mask, b_mask = (rank < r)[:, None] & (token < t)[None, :], inside[:, None] & (rank < r)[None, :]
        right = tl.load(z + token[None, :] * r + rank[:, None], mask=z_mask, other=0.0)
        left = tl.load(bp + row[:, None].to(tl.int64) * r + rank[None, :], mask=b_mask, other=0.0)
        total = dot(left, right, total, WIDEN)
    total = total * scale
    mask = inside[:, None] & (token < t)[None, :]
    for part in range(parts):
        place = (part * t + token)[None, :].to(tl.int64) * n + row[:, None]
        total += tl.load(partial + place, mask=mask, other=0.0)
    place = token[None, :].to(tl.int64) * n + row[:, None]
    tl.store(y + place, total.to(y.dtype.element_ty), mask=mask)
