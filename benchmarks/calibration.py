"""What a safety subspace costs: all linear layers in one pass, against a pass a layer, and memory against the number
of samples.

A pass per layer over the whole model would take an hour on two cores, so it is timed for a few layers spread over the
model, and the mean is multiplied by the number of layers; the table says so. Memory is that of a fresh process per
number of pairs. Run `python -m benchmarks.calibration`.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.common import peak_memory, record, resident_mib, show
from peft_safety import SafetySubspace
from peft_safety.data import refusal_pairs
from peft_safety.estimate.targets import target_layers
from peft_safety.report import environment

RANK = 32
TARGET = 20.0


def load(model_dir: str) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32), AutoTokenizer.from_pretrained(
        model_dir
    )


def timed(
    model: Any, tokenizer: Any, pairs: int, layers: dict[str, Any], progress: bool = False
) -> tuple[float, SafetySubspace]:
    started = time.perf_counter()
    subspace = SafetySubspace.from_activations(
        model, refusal_pairs("calibration", pairs), tokenizer=tokenizer, rank=RANK, layers=layers, progress=progress
    )
    return time.perf_counter() - started, subspace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="model directory; default: the embedded SmolLM2-135M-Instruct")
    parser.add_argument("--pairs", type=int, default=128)
    parser.add_argument("--sampled-layers", type=int, default=4)
    parser.add_argument("--memory", type=int, action="append", help="numbers of pairs; default 32, 128 and 512")
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    from examples.get_model import model_dir

    source = args.model or str(model_dir())
    model, tokenizer = load(source)
    layers = target_layers(model, "all-linear")
    if args.memory_of:
        loaded = resident_mib()
        timed(model, tokenizer, args.memory_of, layers)
        print(json.dumps({"pairs": args.memory_of, "model MiB": loaded, "peak MiB": resident_mib()}))
        return
    one, subspace = timed(model, tokenizer, args.pairs, layers, progress=True)
    names = list(layers)[:: max(1, len(layers) // args.sampled_layers)][: args.sampled_layers]
    each = [timed(model, tokenizer, args.pairs, {name: layers[name]})[0] for name in names]
    per_layer = sum(each) / len(each) * len(layers)
    found = {
        "layers": len(layers),
        "pairs": args.pairs,
        "tokens": subspace.provenance["tokens"],
        "one pass s": one,
        "a pass per layer s": per_layer,
        "timed for layers": len(names),
        "faster": per_layer / one,
    }
    show(f"calibration, k = {RANK}", [found])
    rows = [
        peak_memory("benchmarks.calibration", "--model", source, "--memory-of", str(pairs))
        for pairs in args.memory or [32, 128, 512]
    ]
    show("memory of the process", rows)
    settings = {
        "model": "SmolLM2-135M-Instruct" if args.model is None else "given",
        "k": RANK,
        "threads": torch.get_num_threads(),
    }
    print(
        f"written to {record('calibration', [found, *rows], environment(0, **settings))}; target: at least {TARGET:g} "
        "times faster"
    )


if __name__ == "__main__":
    main()
