"""What a weight basis costs: the top singular directions of one weight beside a full SVD, and of all linear layers of
the real model.

1. One 2048 x 2048 weight of a power-law spectrum, top 32: time beside `torch.linalg.svd`, and the share of the top-32
energy that is found. Also for a random
   Gaussian weight, the flattest spectrum there is and the worst case.
2. Every linear layer of SmolLM2-135M, k = 32 on the input side, in fp32 and NF4: time, and what a fresh process holds
at most beside the model itself.

Run `python -m benchmarks.subspace`    (about a minute).
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import interleaved, medians, peak_memory, ratio, record, resident_mib, show
from peft_safety import SafetySubspace
from peft_safety.estimate.bases import Size, output_basis
from peft_safety.report import environment

WIDTH, RANK = 2048, 32
TARGET = 150.0


def weights() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=g)).Q for _ in range(2))
    values = torch.arange(1, WIDTH + 1).float() ** -0.5
    return {"power law, s_i = i^-1/2": (left * values) @ right.mT, "Gaussian": torch.randn(WIDTH, WIDTH, generator=g)}


def one_weight(name: str, weight: Tensor, rounds: int) -> dict[str, Any]:
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
    found = float((u.mT @ weight).square().sum() / best)
    return {
        "weight": f"{WIDTH} x {WIDTH}, {name}",
        **medians(seconds),
        "full/randomized": gain,
        "quartiles": f"{low:.0f}-{high:.0f}",
        "energy of top 32": found,
    }


def load(kind: str) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from examples.get_model import model_dir

    config = (
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
        if kind == "NF4"
        else None
    )
    return AutoModelForCausalLM.from_pretrained(model_dir(), dtype=torch.float32, quantization_config=config)


def whole_model(kind: str) -> None:
    """Child process: load, estimate, print."""
    model = load(kind)
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
