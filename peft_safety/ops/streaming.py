"""Products with weights, and with differences of two weights, that are too large to hold in fp32: by blocks of rows. V and W never exist as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from peft_safety.ops import dispatch, reference
from peft_safety.ops.quant import QuantBundle

BLOCK_BYTES = 8 << 20
"""Size of one block in fp32, as in Safe LoRA's streams: large enough for the products to run at speed, small enough for a CPU's cache and any GPU."""

Rows = Callable[[int, int], Tensor]


def _blocks(rows: Rows, n: int, k: int) -> Iterator[tuple[int, int, Tensor]]:
    """`(start, stop, block (stop - start, k))` from top to bottom."""
    height = max(1, BLOCK_BYTES // (4 * max(k, 1)))
    for start in range(0, n, height):
        stop = min(start + height, n)
        yield start, stop, rows(start, stop)


def of_nf4(q: QuantBundle) -> Rows:
    """Rows of an NF4 weight, fp32. The scales are decoded once: blocks of quantised scales do not end where rows do."""
    packed, scales = q.wq.reshape(q.n, q.k // 2), reference.scales(q).view(q.n, -1)
    kernels = dispatch.backend(q.wq)

    def rows(start: int, stop: int) -> Tensor:
        part = QuantBundle(packed[start:stop], scales[start:stop].reshape(-1), None, None, None, stop - start, q.k, q.blocksize, 0)
        block: Tensor = kernels.nf4_dequant(part, torch.float32)
        return block

    return rows


def of_difference(wa: Tensor, wb: Tensor) -> Rows:
    """Rows of `V = wa - wb`, fp32 (fp64 for fp64 weights)."""
    dtype = _working(wa)
    return lambda start, stop: wa[start:stop].to(dtype) - wb[start:stop].to(dtype)


def of_nf4_difference(qa: QuantBundle, qb: QuantBundle) -> Rows:
    """Rows of `V = W_a - W_b`, fp32."""
    first, second = of_nf4(qa), of_nf4(qb)
    return lambda start, stop: first(start, stop) - second(start, stop)


def tmul(rows: Rows, n: int, k: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """`(V^T b (k, r), ||V||_F^2 ())` in one pass; the second in fp64, from row norms."""
    total = torch.zeros(k, b.shape[1], dtype=_working(b), device=b.device)
    energy = torch.zeros((), dtype=torch.float64, device=b.device)
    for start, stop, v in _blocks(rows, n, k):
        total.addmm_(v.mT, b[start:stop].to(v.dtype))
        energy += torch.linalg.vector_norm(v, dim=1).double().square().sum()
    return total, energy


def mul(rows: Rows, n: int, k: int, z: Tensor) -> Tensor:
    """`V z (n, r)`."""
    out = torch.empty(n, z.shape[1], dtype=_working(z), device=z.device)
    for start, stop, v in _blocks(rows, n, k):
        torch.mm(v, z.to(v.dtype), out=out[start:stop])
    return out


def _working(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
