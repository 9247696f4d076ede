"""The kernels under Triton's interpreter, on the CPU, in a process of its own (it reads TRITON_INTERPRET when it is
imported): prints one JSON line a case.

python -m tests.ops.interpreted covering|all

Run by `test_interpreted.py`, in its fast form with some combinations of shapes, dtypes and scales only, among which
is every pair of two of them. The interpreter cuts bf16 off where GPUs round it, and cannot multiply matrices of it
(see `WIDEN` in the kernels); so values that should be rounded to bf16 are compared with the truncated ones, and their
rounding is looked for in the compiled code (`test_compiled.py`).
"""

from __future__ import annotations

import itertools
import json
import sys
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from peft_safety import ops
from peft_safety.ops import reference, triton_backend
from tests.ops.helpers import EPS, Case, case, quantized, writes_out_of_bounds

#: n, k, r, block size: whole tiles; tails in rows, columns and rank; blocks larger than a tile; more ranks than those
#: of one program
SHAPES = ((64, 128, 16, 64), (70, 192, 5, 64), (33, 96, 1, 32), (5, 512, 70, 256), (24, 1024, 20, 128))
ROWS = 65


def rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 to `dtype` as the interpreter does it."""
    if dtype != torch.bfloat16:
        return value.to(dtype)
    return (value.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)


def off(found: Tensor, wanted: Tensor) -> float:
    """Largest difference, in spacings of the dtype at the largest entry."""
    return float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max()) / EPS[found.dtype]


def weights(c: Case, dtype: torch.dtype) -> dict[str, Any]:
    dense = reference.unrounded(c.q)
    return {"equal": torch.equal(triton_backend.nf4_dequant(c.q, dtype), rounded(dense, dtype))}


def rank_product(c: Case, dtype: torch.dtype, factor: torch.dtype) -> dict[str, Any]:
    x, a = torch.randn(ROWS, c.q.k).to(dtype), c.a.to(factor)
    z = triton_backend.lora_z(x, a)
    return {"dtype of z": str(z.dtype), "z": off(z, x.double() @ a.double().mT)}


def rank_product_with_truncated_sums() -> dict[str, Any]:
    """As tensor cores sum: 16 columns at a time, exact products, every sum truncated to fp32."""
    from triton.runtime import interpreter

    def dot(self: Any, left: Any, right: Any, sums: Any, *args: Any) -> Any:
        one, other, total = left.data.astype(np.float64), right.data.astype(np.float64), sums.data
        for start in range(0, one.shape[1], 16):
            exact = one[:, start : start + 16] @ other[start : start + 16] + total
            total = exact.astype(np.float32)
            longer = np.abs(total) > np.abs(exact)
            total[longer] = np.nextafter(total[longer], np.float32(0))
        return interpreter.TensorHandle(total, sums.dtype.scalar)

    x, a = torch.randn(triton_backend.Z_TILE.rows, 2048).bfloat16(), torch.randn(16, 2048) / 2048**0.5
    with mock.patch.object(interpreter.InterpreterBuilder, "create_dot", dot):
        z = triton_backend.lora_z(x, a)
    return {"z": off(z, x.double() @ a.double().mT)}


def layer(rows: int) -> dict[str, Any]:
    """Forward and backward in fp32: the same numbers as the reference backend."""
    import os

    c = case(33, 192, 5, nested=True)
    found: dict[str, list[Tensor]] = {}
    torch.manual_seed(rows)
    inputs, dy = torch.randn(rows, 192), torch.randn(rows, 33)
    for name in ("reference", "triton"):
        os.environ["PEFT_SAFETY_BACKEND"] = name
        x, a, bp = (t.clone().requires_grad_() for t in (inputs, c.a, c.bp))
        y = ops.nf4_lora(x, c.q, ops.lora_z(x, a), bp, 0.7)
        found[name] = [y.detach(), *torch.autograd.grad(y, (x, a, bp), dy)]
    return {"off": max(off(got, want) for got, want in zip(found["triton"], found["reference"], strict=True))}


#: index of a shape, plain or quantized scales, dtype
COMBINATIONS = list(
    itertools.product(range(len(SHAPES)), (False, True), (torch.float32, torch.bfloat16, torch.float16))
)


def combinations(which: str) -> list[tuple[int, bool, torch.dtype]]:
    """All of them, or half of them in which every two values are together."""
    return [c for i, c in enumerate(COMBINATIONS) if which == "all" or (i + i // 6) % 2 == 0]


def main(which: str) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for index, nested, dtype in combinations(which):
        shape = SHAPES[index]
        c = case(*shape[:3], blocksize=shape[3], nested=nested)
        place = {"nested": nested, "shape": shape, "dtype": str(dtype)}
        print(json.dumps({"kernel": "weight", **place, **weights(c, dtype)}))
        for factor in (dtype, torch.float32) if dtype != torch.float32 else ():
            where = {**place, "factor": str(factor)}
            print(json.dumps({"kernel": "z", **where, **rank_product(c, dtype, factor)}))
    print(json.dumps({"kernel": "z, truncated sums", **rank_product_with_truncated_sums()}))
    for rows in (3, 70):
        print(json.dumps({"kernel": "layer", "rows": rows, **layer(rows)}))
    print(
        json.dumps(
            {
                "kernel": "bounds",
                "outside": [
                    name
                    for shape in ((70, 192), (5, 64))
                    for name in writes_out_of_bounds(quantized(*shape, nested=True))
                ],
            }
        )
    )
    print(json.dumps({"kernel": "done", "interpreted": triton_backend.INTERPRETED}))


if __name__ == "__main__":
    main(sys.argv[1])
