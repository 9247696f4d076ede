"""The Triton backend: allocates, picks tiles from a small table, launches. CUDA graphs can hold it: it neither waits
for the GPU nor measures at run time. One source for Triton 3.6 to 3.9, compiled or interpreted: no inline assembly, no
autotuning. Each kernel is in a file of its own, and its plain twin in `reference.py`. Dense products stay with torch.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_safety.ops import reference, triton_dequant, triton_z
from peft_safety.ops.quant import QuantBundle


class Tile(NamedTuple):
    """Rows and columns of a tile, and warps that work on it."""

    rows: int
    columns: int
    warps: int


#: By bytes of an output value. Small enough for three thread blocks per processor without spills
#: (tests/ops/test_compiled.py).
WEIGHT_TILES = {2: Tile(64, 64, 8), 4: Tile(16, 128, 4)}
Z_TILE = Tile(32, 32, 4)
"""Rows and columns of x: 4,096 rows are 128 programs, about one on each processor of an H100."""
Z_RANKS = 64
"""Ranks of a program: as many as q, k and v have together at rank 16, so that x is read once for all of them."""
OPTIONS = {"enable_fp_fusion": False}
"""Round products and sums separately, as bitsandbytes does."""
INTERPRETED = type(triton_dequant.dequant_kernel).__name__ == "InterpretedFunction"


def rank_block(r: int) -> int:
    """Ranks of a program for r in all: a power of two that tensor cores accept."""
    return min(Z_RANKS, max(16, 1 << (r - 1).bit_length()))


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
    ranks = rank_block(r)
    terms, widen = z_terms(x.dtype, a.dtype)
    with _on(x):
        triton_z.z_kernel[(-(-t // Z_TILE.rows), -(-r // ranks))](
            z, x, a, x.shape[1], r, t, BT=Z_TILE.rows, BK=Z_TILE.columns, BR=ranks, TERMS=terms, WIDEN=widen,
            num_warps=Z_TILE.warps, **OPTIONS,
        )  # fmt: skip
    return z
