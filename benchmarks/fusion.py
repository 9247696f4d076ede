"""What does training an element mask cost at the size of a 7B model's adapter, beside the three fp32 copies that are
its floor?

    python -m benchmarks.fusion [--layers 32]    (about one minute on one core; 3 GB)

The adapters are synthetic: r = 16 on all linear layers of a 7B Llama, one task that continues from a safe adapter. The
base layers return zeros for one token,
so that what is timed is the mask: its noise, the fusion, their gradients, and AdamW. The floor is the logits and
AdamW's two moments; gradients make a fourth copy. Frozen inputs (the safe factors and the task vectors) are counted
apart. "kept" leaves everything in autograd's graph, as a direct implementation does.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import interleaved, medians, peak_memory, ratio, record, resident_mib, show
from peft_safety.core.plain_lora import Factors
from peft_safety.methods.somf.adapters import MaskedAdapters, apply
from peft_safety.methods.somf.options import FuseOptions
from peft_safety.methods.somf.updates import Continued
from peft_safety.reporting.report import environment

RANK, WIDTH, HIDDEN, TOKENS = 16, 4096, 11008, 1
SHAPES = {
    "q": (WIDTH, WIDTH),
    "k": (WIDTH, WIDTH),
    "v": (WIDTH, WIDTH),
    "o": (WIDTH, WIDTH),
    "gate": (HIDDEN, WIDTH),
    "up": (HIDDEN, WIDTH),
    "down": (WIDTH, HIDDEN),
}
WAYS = ("recomputed", "kept", "only AdamW")
MIB = 1 << 20


class Nothing(nn.Linear):
    """A base layer that costs nothing: its weight is one number, seen at every place, and its output zero."""

    def __init__(self, m: int, n: int) -> None:
        super().__init__(n, m, bias=False, device="meta")
        self.weight = nn.Parameter(torch.zeros(1, 1).expand(m, n), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.out_features)


class Layers(nn.Module):
    """Runs every layer on an input of its own and sums the squares."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({name: Nothing(*shape) for name, shape in SHAPES.items()}) for _ in range(layers)
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Tensor:
        inputs = {width: torch.ones(TOKENS, width) for width in (WIDTH, HIDDEN)}
        return torch.stack(
            [layer(inputs[layer.in_features]).square().mean() for block in self.blocks for layer in block.values()]
        ).sum()


def build(layers: int) -> tuple[MaskedAdapters, float]:
    """The masked model, and the MiB of its frozen inputs."""
    g = torch.Generator().manual_seed(0)

    def factors(m: int, n: int) -> Factors:
        return Factors(0.02 * torch.randn(RANK, n, generator=g), 0.02 * torch.randn(m, RANK, generator=g), 2.0)

    options, updates = FuseOptions(), {}
    for index in range(layers):
        for kind, shape in SHAPES.items():
            name = f"blocks.{index}.{kind}"
            updates[name] = Continued(name, factors(*shape), [(1.0, factors(*shape))], "element", "mean")
    frozen = sum(buffer.numel() * buffer.element_size() for update in updates.values() for buffer in update.buffers())
    return MaskedAdapters(Layers(layers), updates, options), frozen / MIB


def steps(masked: MaskedAdapters) -> dict[str, Callable[[], None]]:
    """One optimizer step, each way."""
    optimizer = torch.optim.AdamW(masked.logit_list.parameters(), lr=1e-2, weight_decay=0.0)
    ids = torch.zeros(1, 1, dtype=torch.long)

    def kept() -> Tensor:
        samples, inputs = masked.samples(), {width: torch.ones(TOKENS, width) for width in (WIDTH, HIDDEN)}
        outputs = [apply(inputs[layer.in_features], *update.factors(samples)) for layer, update in masked.updates]
        return torch.stack([output.square().mean() for output in outputs]).sum()

    def step(how: str) -> None:
        masked.step_seed += 1
        if how == "only AdamW":
            for logit in masked.logit_list:
                logit.grad = torch.zeros_like(logit)
        else:
            (masked(ids, ids) if how == "recomputed" else kept()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return {how: lambda how=how: step(how) for how in WAYS}  # type: ignore[misc]


def measured_memory(how: str, layers: int) -> dict[str, Any]:
    """Peak of a process that does two steps one way."""
    masked, frozen = build(layers)
    with masked.attached():
        step = steps(masked)[how]
        before = _resident()
        step()
        step()
    return {
        "mib": resident_mib(),
        "before": before,
        "frozen": frozen,
        "logits": 4 * sum(p.numel() for p in masked.logit_list) / MIB,
    }


def _resident() -> float:
    """MiB held now (Linux), or at most so far."""
    status = Path("/proc/self/status")
    return int(status.read_text().partition("VmRSS:")[2].split()[0]) / 1024 if status.exists() else resident_mib()


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory-of", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of is not None:
        print(json.dumps(measured_memory(args.memory_of, args.layers)))
        return
    masked, frozen = build(args.layers)
    logits = sum(p.numel() for p in masked.logit_list)
    floor = 3 * 4 * logits / MIB
    with masked.attached():
        seconds = interleaved(steps(masked), args.rounds)
    del masked
    rows = []
    for how in WAYS:
        found = peak_memory("benchmarks.fusion", "--layers", str(args.layers), "--memory-of", how)
        added = found["mib"] - found["before"] + found["logits"]  # the logits are there before the first step
        middle, low, high = ratio(seconds, how, "only AdamW")
        rows.append(
            {
                "way": how,
                "step s": medians(seconds)[f"{how} s"],
                "/ only AdamW": middle,
                "quartiles": f"{low:.2f}-{high:.2f}",
                "mask and optimizer MiB": added,
                "/ floor": added / floor,
                "peak of the process MiB": found["mib"],
            }
        )
    show(
        f"element masks, r = {RANK}, {args.layers} layers, {logits:,} logits; floor (3 fp32 copies) {floor:.0f} MiB, "
        f"frozen inputs {frozen:.0f} MiB",
        rows,
    )
    path = record(
        "fusion",
        rows,
        environment(
            0, r=RANK, layers=args.layers, logits=logits, floor_mib=round(floor, 1), threads=torch.get_num_threads()
        ),
    )
    print(f"written to {path.name}")


if __name__ == "__main__":
    main()
