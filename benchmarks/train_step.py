"""The cost of protection in training: one step (forward, backward, optimizer) of plain LoRA, SaLoRA, the dense
projection of the reference code, GuardSpace's frozen A, and LoRA-FA (PEFT's, with its own optimizer).

Each arm is a model of its own on the same base weights. The arms take turns, forwards and backwards. Wall and CPU
seconds: on a busy machine the second say more. Peak memory is measured in a new process for each arm.

    python -m benchmarks.train_step [--rounds 4 --base fp32 --tokens 512 --arm frozen]

All of it takes an hour on one core; an option leaves out what it does not name.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_lorafa_optimizer
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from benchmarks.common import (
    Spent,
    add_model,
    both_clocks,
    in_turns,
    load_causal,
    model_name,
    model_source,
    parser_of,
    peak_memory,
    quartiles,
    record,
    resident_mib,
    show,
)
from peft_safety import GuardSpaceConfig, SafetySubspace, SaLoRAConfig
from peft_safety.core.base_weights import shape
from peft_safety.core.projection import Side, orthonormalize
from peft_safety.core.targets import target_layers
from peft_safety.reporting.report import environment

ARMS = ("lora", "salora", "dense C", "frozen", "lora-fa")
RATIOS = {
    ("salora", "lora"): "<= 1.05",
    ("dense C", "lora"): "",
    ("dense C", "salora"): ">= 1.5",
    ("frozen", "lora"): "<= 1.00",
    ("lora-fa", "lora"): "",
}
"""The pairs of arms that are compared, with the goal for time."""
RANK, SAFETY_RANK = 16, 32
LEARNING_RATE = 1e-4
PLAIN: dict[str, Any] = {"r": RANK, "lora_alpha": RANK, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
MEMORY_TOKENS = 512


class DenseProjected(nn.Linear):
    """`lora_B` followed by a dense `C (m x m)` on the activations, as in SaLoRA's reference code."""

    complement: Tensor

    def __init__(self, linear: nn.Linear, basis: Tensor) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight = linear.weight
        self.register_buffer("complement", torch.eye(basis.shape[0]) - basis @ basis.mT, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.weight), self.complement)


def any_subspace(model: nn.Module, side: Side) -> SafetySubspace:
    """Random bases on the "in" or "out" side: the cost of a step does not depend on the basis."""
    generator = torch.Generator().manual_seed(0)
    rows = 0 if side == "out" else 1
    return SafetySubspace(
        {
            name: {side: orthonormalize(torch.randn(shape(layer)[rows], SAFETY_RANK, generator=generator))}
            for name, layer in target_layers(model, "all-linear").items()
        }
    )


def adapted(model: nn.Module, arm: str) -> PeftModel:
    """The model under the adapter of an arm, of rank 16 on all linear layers. The rows of a frozen A are random here:
    those that `task_data` gives cost the same.
    """
    config: Any = LoraConfig(**PLAIN)
    subspace = any_subspace(model, "in" if arm == "frozen" else "out")
    if arm == "salora":
        config = SaLoRAConfig(**PLAIN, subspace=subspace)
    elif arm == "frozen":
        config = GuardSpaceConfig(**PLAIN, subspace=subspace, train="B", a_init="random")
    peft_model: PeftModel = get_peft_model(model, config)  # type: ignore[arg-type, assignment]
    if arm == "dense C":
        for name, layer in peft_model.get_base_model().named_modules():
            if isinstance(layer, LoraLayer):
                layer.lora_B["default"] = DenseProjected(layer.lora_B["default"], subspace.bases[name]["out"])
    return peft_model.train()


def step_of(model: nn.Module, arm: str) -> Callable[[int], None]:
    """A function that does one training step of an arm on so many random tokens."""
    peft_model = adapted(model, arm)
    if arm == "lora-fa":
        optimizer = create_lorafa_optimizer(peft_model, r=RANK, lora_alpha=RANK, lr=LEARNING_RATE)
    else:
        optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=LEARNING_RATE)

    def step(tokens: int) -> None:
        generator = torch.Generator().manual_seed(tokens)
        ids = torch.randint(0, peft_model.config.vocab_size, (1, tokens), generator=generator)
        peft_model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def twin(model: nn.Module) -> nn.Module:
    """A model with modules of its own and the same parameters."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def compared(times: dict[str, list[Spent]], of: str, to: str) -> dict[str, Any]:
    """The ratio of two arms in each round by both clocks, median and quartiles, and the median seconds of each."""
    row: dict[str, Any] = {"ratio": f"{of}/{to}", "goal": RATIOS[of, to]}
    seconds: dict[str, float] = {}
    for clock in Spent._fields:
        mine, other = ([getattr(spent, clock) for spent in times[arm]] for arm in (of, to))
        middle, low, high = quartiles([a / b for a, b in zip(mine, other, strict=True)])
        row |= {clock: middle, f"{clock} quartiles": f"{low:.3f}-{high:.3f}"}
        seconds |= {f"{of} {clock} s": statistics.median(mine), f"{to} {clock} s": statistics.median(other)}
    return row | {"seconds": seconds}


def timings(source: str, base: str, arms: list[str], lengths: list[int], rounds: int) -> list[dict[str, Any]]:
    """One row for each number of tokens and each ratio."""
    model = load_causal(source, nf4=base == "nf4")
    steps = {arm: step_of(twin(model), arm) for arm in arms}
    rows: list[dict[str, Any]] = []
    for tokens in lengths:
        works = {arm: lambda step=step, tokens=tokens: step(tokens) for arm, step in steps.items()}
        times = in_turns(works, rounds, 2, both_clocks)
        place = {"base": base, "tokens": tokens, "rounds": rounds}
        own = [{**place, **compared(times, *pair)} for pair in RATIOS if set(pair) <= set(arms)]
        show("one training step", [{key: row[key] for key in row if key != "seconds"} for row in own])
        rows += own
    return rows


def peaks(source: str, base: str, arms: list[str]) -> dict[str, Any]:
    """Peak memory of a process that trains each arm, in MiB and relative to plain LoRA."""
    options = "--model", source, "--base", base, "--memory-of"
    mib = {arm: peak_memory("benchmarks.train_step", *options, arm)["mib"] for arm in arms}
    found = {"base": base, "memory at tokens": MEMORY_TOKENS, **{f"{arm} MiB": value for arm, value in mib.items()}}
    row = found | {f"{arm}/lora": mib[arm] / mib["lora"] for arm in arms if arm != "lora"}
    show("peak memory of the process", [row])
    return row


def memory(source: str, base: str, arm: str) -> None:
    """In a new process: print the peak memory after three steps of one arm."""
    step = step_of(load_causal(source, nf4=base == "nf4"), arm)
    for _ in range(3):
        step(MEMORY_TOKENS)
    print(json.dumps({"mib": resident_mib()}))


def main() -> None:
    parser = parser_of(__doc__)
    add_model(parser)
    parser.add_argument("--base", choices=("fp32", "nf4"), action="append", help="default: both")
    parser.add_argument("--tokens", type=int, action="append", help="default: 128, 512 and 1024")
    parser.add_argument("--arm", choices=ARMS, action="append", help="beside plain LoRA; default: all")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--memory-of", choices=ARMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    source = model_source(args.model)
    bases, lengths = args.base or ["fp32", "nf4"], args.tokens or [128, 512, 1024]
    arms = [arm for arm in ARMS if arm in ("lora", *(args.arm or ARMS))]
    if args.memory_of:
        memory(source, bases[0], args.memory_of)
        return
    settings = {"model": model_name(args.model), "r": RANK, "safety_rank": SAFETY_RANK}
    facts = environment(0, **settings, threads=torch.get_num_threads())
    rows = []
    for base in bases:
        rows += [peaks(source, base, arms), *timings(source, base, arms, lengths, args.rounds)]
        print(f"{base}: written to {record('train_step', rows, facts)}", flush=True)


if __name__ == "__main__":
    main()
