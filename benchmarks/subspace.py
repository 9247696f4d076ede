"""The cost of a weight basis: the top singular directions of one weight, compared with a full SVD; and of all linear
layers of the real model.

1. The top 32 of a 2048 x 2048 weight with a power-law spectrum: time compared with `torch.linalg.svd`, and the share
   of the top-32 energy that the basis holds. The same for a random Gaussian weight, the worst case (a flat spectrum).
2. Every linear layer of SmolLM2-135M, k = 32 on the input side, in fp32 and NF4: time, and peak memory of a process.

    python -m benchmarks.subspace    (one minute)
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import (
    interleaved,
    load_causal,
    medians,
    parser_of,
    peak_memory,
    ratio,
    record,
    resident_mib,
    show,
)
from examples.get_model import model_dir
from peft_safety import SafetySubspace
from peft_safety.calibration.bases import output_basis
from peft_safety.calibration.sizes import Size
from peft_safety.reporting.report import environment

WIDTH, RANK = 2048, 32
TARGET = 150.0


def weights() -> dict[str, Tensor]:
    """The weights by name."""
    g = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=g)).Q for _ in range(2))
    values = torch.arange(1, WIDTH + 1).float() ** -0.5
    return {"power law, s_i = i^-1/2": (left * values) @ right.mT, "Gaussian": torch.randn(WIDTH, WIDTH, generator=g)}


def one_weight(name: str, weight: Tensor, rounds: int) -> dict[str, Any]:
    """One row of the table."""
    seconds = interleaved(
        {
            "randomized": lambda: output_basis(weight, None, Size(rank=RANK), name),
            "full SVD": lambda: torch.linalg.svd(weight, full_matrices=False),
        },
        rounds,
    )
    u, _ = output_basis(weight, None, Size(rank=RANK), name)
    best = torch.linalg.svdvals(weight)[:RANK].square().sum()
    gain, low, high = ratio(seconds, "full SVD", "randomized")
    energy = float((u.mT @ weight).square().sum() / best)
    return {
        "weight": f"{WIDTH} x {WIDTH}, {name}",
        **medians(seconds),
        "full/randomized": gain,
        "quartiles": f"{low:.0f}-{high:.0f}",
        "energy of top 32": energy,
    }


def whole_model(kind: str) -> None:
    """In a new process: estimate all bases of the model and print time and memory."""
    model = load_causal(model_dir(), nf4=kind == "NF4")
    before = resident_mib()
    started = time.perf_counter()
    subspace = SafetySubspace.from_weights(model, rank=RANK, target_modules="all-linear", progress=False)
    print(
        json.dumps(
            {
                "modules": len(subspace.bases),
                "s": time.perf_counter() - started,
                "model MiB": before,
                "peak MiB": resident_mib(),
            }
        )
    )


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model-of", choices=("fp32", "NF4"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.model_of:
        whole_model(args.model_of)
        return
    single = [one_weight(name, weight, args.rounds) for name, weight in weights().items()]
    show("one weight", single)
    models = [
        {"model": f"SmolLM2-135M, {kind}", **peak_memory("benchmarks.subspace", "--model-of", kind)}
        for kind in ("fp32", "NF4")
    ]
    show("all linear layers", models)
    path = record("subspace", [*single, *models], environment(0, k=RANK, threads=torch.get_num_threads()))
    print(f"written to {path}; target: full/randomized >= {TARGET:g} at >= 0.995 of the energy")


if __name__ == "__main__":
    main()
