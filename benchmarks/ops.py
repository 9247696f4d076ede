"""Operations on 4-bit weights: the cost of a protected layer, compared with other ways and with the machine's limit.

On a GPU: K1 (training, 4,096 tokens through the linear layers of a 7B block), K2 (dequantizing) and K6 (projecting all
adapters of a 7B model), eager and as CUDA graphs. On a CPU: the reference backend compared with the naive form, in CPU
seconds. "error" is the relative distance from fp64. Elsewhere: K4 in `benchmarks/safe_lora.py`, K5 in
`benchmarks/subspace.py`, K7 (compiling for four architectures) in the tests, and what a step keeps in
`benchmarks/saved_bytes.py`. K3 (one token through a 7B model) ended with its kernels: PEFT's path serves few rows.

    python -m benchmarks.ops [--smoke]    (`--smoke` tests the GPU parts at tiny sizes on any machine)
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch

from benchmarks import ops_together
from benchmarks.common import RESULTS, cpu_clock, interleaved, parser_of, ratio, record, show
from benchmarks.ops_arms import arms, bare, errors, layer, trained
from benchmarks.ops_gpu import everything, rows_of
from peft_safety.core.environment import environment
from peft_safety.ops import backend_for
from peft_safety.reporting import style

WAYS = ("eager", "graphed")
TARGETS = {
    "K1": {
        "naive SaLoRA / this": ">= 1.2",
        "peft LoRA / this": ">= 1.1",
        "bare GEMM / this": ">= 0.85",
        "this / LoRA on this path": "<= 1.005",
    },
    "K1 joint": dict.fromkeys(
        (f"{kind}: one by one / one function, {mode}" for kind in ("q, k, v", "gate, up") for mode in WAYS), "none"
    ),
    "K2": {"share of copy bandwidth": ">= 0.85", "bitsandbytes / dequantized": ">= 1.3"},
    "K6": {"ms a step, graphed": "<= 0.2", "launches a module": "<= 1"},
}
CPU_SHAPES, CPU_TOKENS = ((1024, 1024), (576, 1536)), (1, 256)
CPU_TOGETHER = ((576, 192, 192), 576), ((1536, 1536), 576), ((2048, 512, 512), 2048)
"""Heights of layers with one input and its width: q, k and v, gate and up of SmolLM2-135M, and a wider q, k and v."""


def on_cpu(rounds: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Forward and backward in fp32, in CPU seconds: is the reference backend a sensible fallback?"""
    rows: list[dict[str, Any]] = []
    figures: dict[str, float] = {}
    for n, k in CPU_SHAPES:
        one = layer(n, k, "cpu", torch.float32)
        for tokens in CPU_TOKENS:
            x, dy = torch.randn(tokens, k), torch.randn(tokens, n)
            works = {
                name: trained(arm, x, dy) for name, arm in {**arms(one), "bare GEMM": bare(one, torch.float32)}.items()
            }
            seconds = interleaved(works, rounds, clock=cpu_clock)
            place = f"CPU {n} x {k}, {tokens} tokens"
            rows += rows_of(place, "CPU time", seconds, statistics.median(seconds["bare GEMM"]), errors(one, x))
            for of, to in (("naive SaLoRA", "this"), ("peft LoRA", "this"), ("peft LoRA", "this, frozen A")):
                figures[f"{place}: {of} / {to}"] = ratio(seconds, of, to)[0]
    for heights, k in CPU_TOGETHER:
        seconds = interleaved(ops_together.works(heights, k, 512, "cpu", torch.float32), rounds, clock=cpu_clock)
        place = f"CPU {k} to {' + '.join(map(str, heights))}, 512 tokens"
        rows += rows_of(place, "CPU time", seconds, min(map(statistics.median, seconds.values())))
        figures[f"{place}: one by one / one function"] = ratio(seconds, *ops_together.ARMS)[0]
    return rows, figures


def draw(rows: list[dict[str, Any]], path: Path) -> Path:
    """Medians with quartiles, one panel for each part; a line marks the floor."""
    parts: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        parts.setdefault(f"{row['part']}, {row['mode']}", []).append(row)
    sizes = [len(shown) + 2.5 for shown in parts.values()]
    title, note = "Microseconds of operations on 4-bit weights", "Thin lines: quartiles. Dotted: the machine's limit."
    with style.picture(path, 0.19 * sum(sizes), len(parts), len(parts), title, note, height_ratios=sizes) as (
        _,
        panels,
    ):
        for panel, (name, shown) in zip(panels, parts.items(), strict=True):
            for y, row in enumerate(shown):
                tint = style.color_of("guardspace" if row["arm"].startswith("this") else row["arm"])
                style.bar(panel, y, row["us"], tint, (row["low"], row["high"]), height=0.75)
            panel.axvline(shown[0]["of floor"] * shown[0]["us"], color=style.INK, lw=1, ls=":")
            panel.set_yticks(range(len(shown)), [row["arm"] for row in shown])
            panel.set_title(name)
            panel.tick_params(axis="y", length=0)
            panel.invert_yaxis()
    return path


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes; nothing is recorded")
    args = parser.parse_args()
    gpu = torch.cuda.is_available()
    device = "cuda" if gpu else "cpu"
    if args.smoke:
        rows, figures = everything(device, 3, tiny=True)
        show("a test of the code at tiny sizes: these numbers mean nothing", rows)
        print({part: list(values) for part, values in figures.items()})
        return
    name, reason = backend_for(torch.empty(1, device=device))
    print(f"backend: {name} ({reason})")
    if gpu:
        rows, figures = everything(device, args.rounds, tiny=False)
        for part, values in figures.items():
            for what, value in values.items():
                print(f"{part}  {what}: {value:.3g}  (target {TARGETS[part][what]})")
    else:
        rows, ratios = on_cpu(args.rounds)
        figures = {"CPU": ratios}
        for what, value in ratios.items():
            print(f"{what}: {value:.3g}")
        print("K1, K2 and K6 need a GPU and have not been run.")
    show("operations" + (f" on {torch.cuda.get_device_name()}" if gpu else " on the CPU, fp32"), rows)
    extra = {
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "backend": name,
        "threads": torch.get_num_threads(),
        "figures": figures,
    }
    stem = "ops_gpu" if gpu else "ops_cpu"
    path = record(stem, rows, environment(0, **extra))
    draw(rows, RESULTS / f"{stem}.png")
    print(f"written to {path} and {path.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
