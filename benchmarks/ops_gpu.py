"""K1, K2 and K6 of the benchmark of operations, which need a GPU. Each function returns the rows of a table and
the figures that have targets; see `ops.py`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import ops_together
from benchmarks.common import quartiles, ratio
from benchmarks.ops_arms import BLOCK, BLOCKS, SAFETY_RANK, Layer, R, arms, bare, errors, layer, trained
from benchmarks.ops_timing import bandwidth, both_ways, launches
from peft_safety import ops
from peft_safety.core.projection import project_wide
from peft_safety.ops import reference

Row = dict[str, Any]
Shapes = Sequence[tuple[int, int]]
POOL_BYTES = 512 << 20
"""Size of the weights that memory-bound kernels read in turn: much larger than the cache of any GPU."""


def rows_of(
    part: str, mode: str, seconds: dict[str, list[float]], floor: float, errors: Mapping[str, float] | None = None
) -> list[Row]:
    """One row for each arm: median and quartiles in microseconds, its speed as a share of the floor's, and its error
    beside fp64 where it was measured.
    """
    rows = []
    for name, values in seconds.items():
        middle, low, high = quartiles(values)
        rows.append(
            {
                "part": part,
                "mode": mode,
                "arm": name,
                "us": middle * 1e6,
                "low": low * 1e6,
                "high": high * 1e6,
                "of floor": floor / middle,
                "error": (errors or {}).get(name, ""),
            }
        )
    return rows


def k1_training(
    shapes: Shapes, tokens: int, device: str, dtype: torch.dtype, rounds: int
) -> tuple[list[Row], dict[str, float]]:
    """Forward and backward of all linear layers of one block. The floor is the matrix products alone, with a dense
    weight.
    """
    layers = [layer(n, k, device, dtype, seed) for seed, (n, k) in enumerate(shapes)]
    work: dict[str, list[Callable[[], Any]]] = {}
    for one in layers:
        x, dy = (torch.randn(tokens, size, device=device, dtype=dtype) for size in (one.q.k, one.q.n))
        for name, arm in {**arms(one), "bare GEMM": bare(one, dtype)}.items():
            work.setdefault(name, []).append(trained(arm, x, dy))
    works = {name: (lambda parts=parts: [part() for part in parts]) for name, parts in work.items()}
    seconds = both_ways(works, rounds, device)
    off = errors(layers[0], torch.randn(min(tokens, 256), layers[0].q.k, device=device, dtype=dtype))
    rows: list[Row] = []
    for mode, times in seconds.items():
        rows += rows_of("K1", mode, times, statistics.median(times["bare GEMM"]), off)
    eager = seconds["eager"]
    return rows, {
        "naive SaLoRA / this": ratio(eager, "naive SaLoRA", "this")[0],
        "peft LoRA / this": ratio(eager, "peft LoRA", "this")[0],
        "bare GEMM / this": ratio(eager, "bare GEMM", "this")[0],
        "this / LoRA on this path": ratio(eager, "this", "LoRA, this path")[0],
    }


def joint(
    shapes: Shapes, tokens: int, device: str, dtype: torch.dtype, rounds: int
) -> tuple[list[Row], dict[str, float]]:
    """The layers of a block that have one input: one after another, or as one autograd function (`ops_together.py`).
    There is no goal: the figures say whether such a function would be worth its code. The floor is the faster one.
    """
    rows: list[Row] = []
    figures: dict[str, float] = {}
    for kind, (first, last) in {"q, k, v": (0, 3), "gate, up": (4, 6)}.items():
        together = shapes[first:last] or shapes[:1] * 2
        ways = ops_together.works([n for n, _ in together], together[0][1], tokens, device, dtype)
        for mode, times in both_ways(ways, rounds, device).items():
            rows += rows_of(f"K1 {kind}", mode, times, min(map(statistics.median, times.values()), default=0.0))
            both = times.keys() == set(ops_together.ARMS)  # an arm that cannot be captured is missing
            figures[f"{kind}: one by one / one function, {mode}"] = (
                ratio(times, *ops_together.ARMS)[0] if both else float("nan")
            )
    return rows, figures


def k2_weights(n: int, k: int, device: str, dtype: torch.dtype, rounds: int) -> tuple[list[Row], dict[str, float]]:
    """Dequantizing a weight. The weights take turns, so that no cache holds them."""
    from bitsandbytes.functional import dequantize_4bit

    count = max(2, POOL_BYTES // (n * k * 3)) if device != "cpu" else 2
    pool: list[Layer] = [layer(n, k, device, dtype, seed) for seed in range(count)]

    def over(call: Callable[[Layer], Tensor]) -> Callable[[], Any]:
        return lambda: [call(one) for one in pool]

    calls: dict[str, Callable[[Layer], Tensor]] = {
        "bitsandbytes": lambda one: dequantize_4bit(one.base.weight.data, one.state),
        "dequantized": lambda one: ops.nf4_dequant(one.q, dtype),
    }
    works = {name: over(call) for name, call in calls.items()}
    moved = n * k * (0.5 + 1 / 64 + 4 / 64 / 256 + dtype.itemsize)
    floor = moved / bandwidth(device, 1024 if device != "cpu" else 8)
    exact = reference.unrounded(pool[0].q).double()
    off = {name: float((work(pool[0]).double() - exact).norm() / exact.norm()) for name, work in calls.items()}
    rows: list[Row] = []
    for mode, seconds in both_ways(works, rounds, device).items():
        each = {name: [value / count for value in values] for name, values in seconds.items()}
        rows += rows_of(f"K2 {n} x {k}", mode, each, floor, off)
        best = {name: statistics.median(values) for name, values in each.items()}
    return rows, {
        "share of copy bandwidth": floor / best["dequantized"],
        "bitsandbytes / dequantized": best["bitsandbytes"] / best["dequantized"],
    }


def k6_projections(shapes: Shapes, blocks: int, device: str, rounds: int) -> tuple[list[Row], dict[str, float]]:
    """Projecting the factors of all adapters of a model, with one call for each module, as in its forward."""
    heights = [n for n, _ in shapes] * blocks
    bases = [torch.linalg.qr(torch.randn(n, min(SAFETY_RANK, n // 2), device=device)).Q for n in heights]
    pairs = [(u, torch.randn(u.shape[0], R, device=device)) for u in bases]

    def each() -> None:
        for u, w in pairs:
            project_wide(u, w, "out")

    moved = sum(4 * (2 * u.numel() + 3 * w.numel()) for u, w in pairs)
    floor = moved / bandwidth(device, 1024 if device != "cpu" else 8)
    seconds = both_ways({"one call a module": each}, rounds, device)
    rows = [row for mode, times in seconds.items() for row in rows_of("K6", mode, times, floor)]
    graphs = seconds["graphed"].get("one call a module", [float("nan")])
    count = launches(each, device)
    a_module = float("nan") if count is None else count / len(pairs)
    return rows, {"ms a step, graphed": statistics.median(graphs) * 1e3, "launches a module": a_module}


def everything(device: str, rounds: int, *, tiny: bool) -> tuple[list[Row], dict[str, dict[str, float]]]:
    """All parts. `tiny` tests the code with sizes for a CPU; its numbers mean nothing."""
    shapes: Shapes = ((128, 64), (64, 128)) if tiny else BLOCK
    blocks, tokens = (2, 80) if tiny else (BLOCKS, 4096)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    rows: list[Row] = []
    figures: dict[str, dict[str, float]] = {}
    parts = {
        "K1": lambda: k1_training(shapes, tokens, device, dtype, rounds),
        "K1 joint": lambda: joint(shapes, tokens, device, dtype, rounds),
        "K2": lambda: k2_weights(*((128, 128) if tiny else (4096, 4096)), device, dtype, rounds),
        "K6": lambda: k6_projections(shapes, blocks, device, rounds),
    }
    for name, part in parts.items():
        measured, figures[name] = part()
        rows += measured
    return rows, figures
