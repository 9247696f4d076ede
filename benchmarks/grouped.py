"""What it costs to project all adapters of the real model: folded together, as behind an optimizer's step, against
module by module; and what is left of it in a training step, now that no forward projects a folded weight.

Interleaved, on whatever device the model is on. Run `python -m benchmarks.grouped` (a minute). The number of calls for
the modules of a 7B model is counted in tests/peft/test_grouped.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from peft import get_peft_model
from torch import nn

from benchmarks.common import interleaved, medians, ratio, record, show
from peft_safety import OrthoSafetyPatchConfig, SafetySubspace, SaLoRAConfig, projection
from peft_safety.environment import environment
from peft_safety.estimate.targets import target_layers
from peft_safety.layers import ProtectedLinear, fold_together, protected_leaves
from peft_safety.projection import orthonormalize
from peft_safety.weights import shape

RANK = 16


def subspace(model: nn.Module, side: str) -> SafetySubspace:
    """Random bases; on the input side one for each distinct input, as calibration gives them."""
    generator = torch.Generator().manual_seed(0)
    bases: dict[str, Any] = {}
    shared: dict[tuple[str, str], torch.Tensor] = {}
    for name, layer in target_layers(model, "all-linear").items():
        m, n = shape(layer)
        block, _, kind = name.rpartition(".")
        if side == "out":
            bases[name] = {"out": orthonormalize(torch.randn(m, 32, generator=generator))}
            continue
        key = (
            block,
            {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "mlp", "up_proj": "mlp"}.get(kind, kind),
        )
        if key not in shared:
            shared[key] = orthonormalize(torch.randn(n, n // 4, generator=generator))
        bases[name] = {"in": shared[key]}
    return SafetySubspace(bases)


def folds(leaves: list[ProtectedLinear]) -> dict[str, Callable[[], None]]:
    """Ways to fold every leaf once: each as its forward projects, in place one after another, and batched."""

    @torch.no_grad()
    def one_by_one() -> None:
        for leaf in leaves:
            leaf.raw().copy_(projection.project_wide(leaf.basis, leaf.raw(), leaf.side))  # type: ignore[arg-type]

    return {
        "module by module": one_by_one,
        "in place": lambda: fold_together(leaves, batched=False),
        "batched": lambda: fold_together(leaves, batched=True),
    }


def steps(leaves: list[ProtectedLinear], accumulate: int = 1) -> dict[str, Callable[[], None]]:
    """All that one training step projects, without the model: `accumulate` forwards and backwards, and the fold."""
    gradients = [torch.randn_like(leaf.raw()) for leaf in leaves]

    def step(weight_of: Callable[[ProtectedLinear], torch.Tensor], fold: Callable[[], None]) -> None:
        for _ in range(accumulate):
            torch.autograd.backward([weight_of(leaf) for leaf in leaves], gradients)
        fold()
        for leaf in leaves:
            leaf.raw().grad = None

    def projecting(leaf: ProtectedLinear) -> torch.Tensor:
        return projection.project_wide(leaf.basis, leaf.raw(), leaf.side)  # type: ignore[arg-type]

    return {
        "each forward projects": lambda: step(projecting, folds(leaves)["module by module"]),
        "folded": lambda: step(lambda leaf: leaf.projected(), lambda: fold_together(leaves)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="model directory; default: the embedded SmolLM2-135M-Instruct")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    from transformers import AutoModelForCausalLM

    from examples.get_model import model_dir

    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows: list[dict[str, Any]] = []
    spent: list[dict[str, Any]] = []
    for side in ("out", "in"):
        base = AutoModelForCausalLM.from_pretrained(args.model or str(model_dir()), dtype=torch.float32).to(device)
        options = {
            "r": RANK,
            "lora_alpha": RANK,
            "target_modules": "all-linear",
            "task_type": "CAUSAL_LM",
            "subspace": subspace(base, side),
        }
        model = get_peft_model(
            base, SaLoRAConfig(**options) if side == "out" else OrthoSafetyPatchConfig(**options, side="in")
        )
        leaves = [leaf for _, leaf in protected_leaves(model)]
        held = {id(leaf.basis): leaf.basis.numel() * 4 / 2**20 for leaf in leaves if leaf.basis is not None}
        every = sum(leaf.basis.numel() * 4 / 2**20 for leaf in leaves if leaf.basis is not None)
        seconds = interleaved(folds(leaves), args.rounds)
        facts = {
            "side": side,
            "device": device,
            "leaves": len(leaves),
            "bases MiB": sum(held.values()),
            "as copies MiB": every,
        }
        rows.append(
            {
                **facts,
                **medians(seconds),
                **{f"gain {arm}": ratio(seconds, "module by module", arm)[0] for arm in ("in place", "batched")},
            }
        )
        for accumulate in (1, 8):
            seconds = interleaved(steps(leaves, accumulate), args.rounds)
            spent.append(
                {
                    "side": side,
                    "micro-batches": accumulate,
                    **medians(seconds),
                    "gain": ratio(seconds, "each forward projects", "folded")[0],
                }
            )
    show("one fold of every adapter", rows)
    show("what a training step projects", spent)
    where = record(
        "grouped",
        [*rows, *spent],
        environment(0, r=RANK, threads=torch.get_num_threads(), rounds=args.rounds),
    )
    print(f"written to {where}")


if __name__ == "__main__":
    main()
