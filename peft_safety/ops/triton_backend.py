"""The Triton backend: allocates, picks tiles from a small table, launches. CUDA graphs can hold it: it neither waits
for the GPU nor measures at run time. Dense products stay with torch: only what reads packed weights is a kernel.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_safety.ops import reference, triton_dequant, triton_finish, triton_partial, triton_z
from peft_safety.ops.quant import QuantBundle


class Tile(NamedTuple):
    """Rows and columns of a tile, and warps that work on it."""

    rows: int
    columns: int
    warps: int


#: By bytes of an output value. Small enough for three thread blocks per processor without spills
#: (tests/ops/test_compiled.py).
WEIGHT_TILES = {2: Tile(64, 64, 8), 4: Tile(16, 128, 4)}
SKINNY_TILE = Tile(32, 64, 4)
FINISH_ROWS = 16
Z_TILE = Tile(32, 32, 4)
"""Rows and columns of x: 4,096 rows are 128 programs, about one on each processor of an H100."""
Z_RANKS = 64
"""Ranks of a program: as many as q, k and v have together at rank 16, so that x is read once for all of them."""
PROGRAMS = 1024
"""Target number of programs of a skinny product: about eight on each of the 132 processors of an H100."""
LEAST_COLUMNS = 256
"""Smallest number of columns of a part."""
SUM_SHARE = 64
"""Columns of a part per row of x: the fp32 sums are then a quarter of the part's packed weights."""
MOST_PARTS = 16
RANK_STEPS = {2: 64, 4: 16}
"""Ranks that a tile holds at a time, by bytes of a factor; fp32 does not use tensor cores."""
OPTIONS = {"enable_fp_fusion": False}
"""Round products and sums separately, as bitsandbytes does."""
INTERPRETED = type(triton_dequant.dequant_kernel).__name__ == "InterpretedFunction"


def rank_block(r: int, dtype: torch.dtype) -> int:
    """Ranks held at a time: a power of two that tensor cores accept."""
    return min(RANK_STEPS[dtype.itemsize], max(16, 1 << (max(r, 1) - 1).bit_length()))


def finish_ranks(r: int, dtype: torch.dtype, width: int) -> int:
    """Ranks held with the sums of `width` rows of x: 1,024 values of z at a time, to avoid spills."""
    return min(rank_block(r, dtype), 1024 // width)


def token_block(t: int) -> int:
    """Rows of x, padded to a power of two that tensor cores accept."""
    return max(16, 1 << (t - 1).bit_length())


def unroll(chunk: int, width: int) -> int:
    """Chunks that are loaded ahead: two if `width` rows of x leave enough registers; four would spill on sm_80."""
    return max(1, min(2, chunk // width))


def splits(n: int, k: int, t: int) -> int:
    """Number of parts of a skinny product's columns; it depends on the shape only, not on the GPU."""
    wanted = max(1, PROGRAMS * SKINNY_TILE.rows // max(n, 1))
    possible = max(1, k // max(LEAST_COLUMNS, SUM_SHARE * t))
    return 1 << (min(wanted, possible, MOST_PARTS).bit_length() - 1)


@cache
def words(device: torch.device, dtype: torch.dtype) -> Tensor:
    """`reference.pairs` of a 16-bit dtype, each pair as one word `(256,)`; the first value in its low half."""
    return reference.pairs(device, dtype).contiguous().view(torch.int32).reshape(-1)


def _on(tensor: Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _bundle(q: QuantBundle) -> tuple[Tensor, ...]:
    """The tensors of a bundle. A kernel needs a valid pointer for a missing one too, and never reads it."""
    return tuple(q.absmax if part is None else part for part in q[:5])


def nf4_dequant(q: QuantBundle, dtype: torch.dtype) -> Tensor:
    out = torch.empty(q.n, q.k, dtype=dtype, device=q.wq.device)
    if not out.numel():
        return out
    tile = WEIGHT_TILES[dtype.itemsize]
    programs = -(-q.n // tile.rows) * -(-q.k // tile.columns)
    with _on(out):
        triton_dequant.dequant_kernel[(programs,)](
            out, *_bundle(q), reference.code(out.device), q.n, q.k,
            BLOCKSIZE=q.blocksize, BLOCK2=max(q.blocksize2, 1), NESTED=q.nested, BN=tile.rows, BK=tile.columns,
            num_warps=tile.warps, **OPTIONS,
        )  # fmt: skip
    return out


def nf4_skinny(x: Tensor, q: QuantBundle, z: Tensor, bp: Tensor, scale: float) -> Tensor:
    """See `reference.nf4_skinny`. Two launches read only the packed weight; fp32 is dequantized first."""
    t, r = x.shape[0], bp.shape[1]
    if x.dtype == torch.float32 or not t or not q.n:
        return reference.plus(x, nf4_dequant(q, x.dtype), z, bp, scale)
    x, z, bp = x.contiguous(), z.contiguous(), bp.contiguous()
    tile, width = SKINNY_TILE, token_block(t)
    chunk = min(q.blocksize, tile.columns)  # columns that are multiplied before the scale of their block is applied
    parts = splits(q.n, q.k, t)
    partial = torch.empty(parts, t, q.n, dtype=torch.float32, device=x.device)
    y = torch.empty(t, q.n, dtype=x.dtype, device=x.device)
    with _on(x):
        triton_partial.partial_kernel[(-(-q.n // tile.rows), parts)](
            partial, x, *_bundle(q), words(x.device, x.dtype), q.n, q.k, t, -(-(q.k // chunk) // parts),
            BLOCKSIZE=q.blocksize, BLOCK2=max(q.blocksize2, 1), NESTED=q.nested, BN=tile.rows, BK=chunk, BT=width,
            UNROLL=unroll(chunk, width), WIDEN=INTERPRETED, num_warps=tile.warps, **OPTIONS,
        )  # fmt: skip
        triton_finish.finish_kernel[(-(-q.n // FINISH_ROWS),)](
            y, z, partial, bp, scale, q.n, r, t, parts,
            BN=FINISH_ROWS, BT=width, BR=finish_ranks(r, z.dtype, width), WIDEN=INTERPRETED, num_warps=4, **OPTIONS,
        )  # fmt: skip
    return y


def z_terms(x: torch.dtype, a: torch.dtype) -> tuple[int, bool]:
    """How many terms stand for a value of A, and whether both sides are widened instead: see `triton_z.py`."""
    terms = 3 if (x, a) == (torch.bfloat16, torch.float32) else 1
    return terms, INTERPRETED or (terms == 1 and x != a)


def lora_z(x: Tensor, a: Tensor) -> Tensor:
    """See `reference.lora_z`, which also serves fp32 and few rows: too few programs for a GPU."""
    t, r = x.shape[0], a.shape[0]
    if x.dtype == torch.float32 or t < Z_TILE.rows or not r:
        return reference.lora_z(x, a)
    x, a = x.contiguous(), a.contiguous()
    z = torch.empty(t, r, dtype=torch.promote_types(x.dtype, a.dtype), device=x.device)
    ranks = min(Z_RANKS, token_block(r))
    terms, widen = z_terms(x.dtype, a.dtype)
    with _on(x):
        triton_z.z_kernel[(-(-t // Z_TILE.rows), -(-r // ranks))](
            z, x, a, x.shape[1], r, t, BT=Z_TILE.rows, BK=Z_TILE.columns, BR=ranks, TERMS=terms, WIDEN=widen,
            num_warps=Z_TILE.warps, **OPTIONS,
        )  # fmt: skip
    return z
