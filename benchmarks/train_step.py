"""The cost of protection in training: one step (forward, backward, AdamW) of SaLoRA, plain LoRA and the dense
projection of the reference code.

One base model carries the three adapters, so that only the active adapter differs. The arms take turns. Time is that
of the processor; peak memory is measured in a new process for each arm.

    python -m benchmarks.train_step [--rounds 3 --base fp32]    (15 minutes on two cores; less with these options)
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from benchmarks.common import (
    add_model,
    compared,
    cpu_clock,
    interleaved,
    load_causal,
    model_name,
    model_source,
    parser_of,
    peak_memory,
    ratio,
    record,
    resident_mib,
    show,
)
from peft_safety import SafetySubspace, SaLoRAConfig
from peft_safety.core.base_weights import shape
from peft_safety.core.projection import orthonormalize
from peft_safety.core.targets import target_layers
from peft_safety.reporting.report import environment

ARMS = ("lora", "salora", "dense C")
RANK, SAFETY_RANK = 16, 32
TARGET = 1.05
"""Largest ratio to plain LoRA, in memory and, from 512 tokens on, in time."""


class DenseProjected(nn.Linear):
    """`lora_B` followed by a dense `C (m x m)` on the activations, as in SaLoRA's reference code."""

    def __init__(self, linear: nn.Linear, basis: Tensor) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight = linear.weight
        self.register_buffer("complement", torch.eye(basis.shape[0]) - basis @ basis.mT, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.weight), self.complement)


def any_subspace(model: nn.Module) -> SafetySubspace:
    """Random bases: the cost of a step does not depend on the basis."""
    generator = torch.Generator().manual_seed(0)
    layers = target_layers(model, "all-linear")
    return SafetySubspace(
        {
            n: {"out": orthonormalize(torch.randn(shape(layer)[0], SAFETY_RANK, generator=generator))}
            for n, layer in layers.items()
        }
    )


def adapter_name(arm: str) -> str:
    """The name of an arm's adapter. PEFT warns of names that are a part of its prefix `lora_`."""
    return f"{arm.replace(' ', '_')}_arm"


def with_adapters(model: nn.Module, arms: tuple[str, ...]) -> PeftModel:
    """The model with one adapter for each arm, of equal rank on all linear layers."""
    subspace = any_subspace(model)
    plain = {"r": RANK, "lora_alpha": RANK, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    configs = {
        arm: SaLoRAConfig(**plain, subspace=subspace) if arm == "salora" else LoraConfig(**plain) for arm in arms
    }
    first = arms[0]
    peft_model: PeftModel = get_peft_model(model, configs[first], adapter_name=adapter_name(first))
    for arm in arms[1:]:
        peft_model.add_adapter(adapter_name(arm), configs[arm])
    if "dense C" in arms:
        for name, layer in peft_model.get_base_model().named_modules():
            if isinstance(layer, LoraLayer):
                layer.lora_B[adapter_name("dense C")] = DenseProjected(
                    layer.lora_B[adapter_name("dense C")], subspace.bases[name]["out"]
                )
    return peft_model


def step_of(model: PeftModel, arm: str, tokens: int) -> Callable[[], None]:
    """A function that does one training step of an arm on random tokens."""
    adapter = adapter_name(arm)
    model.set_adapter(adapter)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(tokens))

    def step() -> None:
        model.set_adapter(adapter)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def timings(source: str, base: str, lengths: list[int], rounds: int) -> list[dict[str, Any]]:
    """One row for each number of tokens."""
    model = with_adapters(load_causal(source, nf4=base == "nf4"), ARMS).train()
    rows = []
    for tokens in lengths:
        seconds = interleaved({arm: step_of(model, arm, tokens) for arm in ARMS}, rounds, clock=cpu_clock)
        rows.append(
            {
                "base": base,
                "tokens": tokens,
                "rounds": rounds,
                **compared(seconds, "salora", "lora", 3),
                "dense C/salora": ratio(seconds, "dense C", "salora")[0],
            }
        )
        show("one training step", rows[-1:])
    return rows


def memory(source: str, base: str, arm: str, tokens: int) -> None:
    """In a new process: print the peak memory after three steps of one arm."""
    model = with_adapters(load_causal(source, nf4=base == "nf4"), (arm,)).train()
    step = step_of(model, arm, tokens)
    for _ in range(3):
        step()
    print(json.dumps({"mib": resident_mib()}))


def main() -> None:
    parser = parser_of(__doc__)
    add_model(parser)
    parser.add_argument("--base", choices=("fp32", "nf4"), action="append", help="default: both")
    parser.add_argument("--tokens", type=int, action="append", help="default: 128, 512 and 1024")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory-of", choices=ARMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    source = model_source(args.model)
    bases, lengths = args.base or ["fp32", "nf4"], args.tokens or [128, 512, 1024]
    if args.memory_of:
        memory(source, bases[0], args.memory_of, lengths[0])
        return
    rows = []
    for base in bases:
        peaks = {
            arm: peak_memory(
                "benchmarks.train_step", "--model", source, "--base", base, "--tokens", "512", "--memory-of", arm
            )["mib"]
            for arm in ARMS
        }
        memory_row = {
            "base": base,
            **{f"{arm} MiB": peaks[arm] for arm in ARMS},
            "salora/lora": peaks["salora"] / peaks["lora"],
        }
        show("peak memory of the process, 512 tokens", [memory_row])
        rows += [*timings(source, base, lengths, args.rounds), memory_row]
    show("one training step, median of interleaved rounds", [row for row in rows if "tokens" in row])
    settings = {
        "model": model_name(args.model),
        "r": RANK,
        "safety_rank": SAFETY_RANK,
        "threads": torch.get_num_threads(),
    }
    print(
        f"written to {record('train_step', rows, environment(0, **settings))}; targets: salora/lora <= {TARGET} from "
        "512 tokens on, dense C/salora >= 1.5"
    )


if __name__ == "__main__":
    main()
