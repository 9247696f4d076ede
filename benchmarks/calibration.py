"""The cost of a safety subspace: one pass for all linear layers compared with one pass for each layer; and memory for
different numbers of samples.

One pass for each layer would take an hour on two cores. So a few layers of the model are timed, and the mean is
multiplied by the number of layers. Memory is measured in a new process for each number of pairs.

    python -m benchmarks.calibration
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from transformers import AutoTokenizer

from benchmarks.common import (
    add_model,
    load_causal,
    model_name,
    model_source,
    parser_of,
    peak_memory,
    record,
    resident_mib,
    show,
)
from peft_safety import SafetySubspace
from peft_safety.core.targets import target_layers
from peft_safety.data import refusal_pairs
from peft_safety.reporting.report import environment

RANK = 32
TARGET = 20.0


def timed(
    model: Any, tokenizer: Any, pairs: int, layers: dict[str, Any], progress: bool = False
) -> tuple[float, SafetySubspace]:
    """Seconds of one calibration of these layers, and its subspace."""
    started = time.perf_counter()
    subspace = SafetySubspace.from_activations(
        model, refusal_pairs("calibration", pairs), tokenizer=tokenizer, rank=RANK, layers=layers, progress=progress
    )
    return time.perf_counter() - started, subspace


def main() -> None:
    parser = parser_of(__doc__)
    add_model(parser)
    parser.add_argument("--pairs", type=int, default=128)
    parser.add_argument("--sampled-layers", type=int, default=4)
    parser.add_argument("--memory", type=int, action="append", help="numbers of pairs; default 32, 128 and 512")
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    source = model_source(args.model)
    model, tokenizer = load_causal(source), AutoTokenizer.from_pretrained(source)
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
    passes = {
        "layers": len(layers),
        "pairs": args.pairs,
        "tokens": subspace.provenance["tokens"],
        "one pass s": one,
        "a pass per layer s": per_layer,
        "timed for layers": len(names),
        "faster": per_layer / one,
    }
    show(f"calibration, k = {RANK}", [passes])
    rows = [
        peak_memory("benchmarks.calibration", "--model", source, "--memory-of", str(pairs))
        for pairs in args.memory or [32, 128, 512]
    ]
    show("memory of the process", rows)
    facts = environment(0, model=model_name(args.model), k=RANK, threads=torch.get_num_threads())
    path = record("calibration", [passes, *rows], facts)
    print(f"written to {path}; target: at least {TARGET:g} times faster")


if __name__ == "__main__":
    main()
