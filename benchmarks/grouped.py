"""What it costs to project all adapters of the real model: all together (as an optimizer's step does) against
module by module.

Interleaved, on whatever device the model is on. Run `python -m benchmarks.grouped` (a minute). The number of calls for the modules of a 7B model is counted in
tests/peft/test_grouped.py.
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
from peft_safety.layers import fold_together, protected_leaves
from peft_safety.projection import orthonormalise
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
            bases[name] = {"out": orthonormalise(torch.randn(m, 32, generator=generator))}
            continue
        key = (block, {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "mlp", "up_proj": "mlp"}.get(kind, kind))
        if key not in shared:
            shared[key] = orthonormalise(torch.randn(n, n // 4, generator=generator))
        bases[name] = {"in": shared[key]}
    return SafetySubspace(bases)


def arms(model: nn.Module) -> dict[str, Callable[[], None]]:
    """Ways to project every leaf once: as the forward of each module would, in place one after another, and batched."""
    leaves = [leaf for _, leaf in protected_leaves(model) if leaf.basis is not None]

    @torch.no_grad()
    def one_by_one() -> None:
        for leaf in leaves:
            leaf.raw().copy_(projection.project_wide(leaf.basis, leaf.raw(), leaf.side))  # type: ignore[arg-type]

    return {"module by module": one_by_one, "in place": lambda: fold_together(leaves, batched=False), "batched": lambda: fold_together(leaves, batched=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="model directory; default: the embedded SmolLM2-135M-Instruct")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    from transformers import AutoModelForCausalLM

    from examples.get_model import model_dir

    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for side in ("out", "in"):
        base = AutoModelForCausalLM.from_pretrained(args.model or str(model_dir()), dtype=torch.float32).to(device)
        options = {"r": RANK, "lora_alpha": RANK, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "subspace": subspace(base, side)}
        model = get_peft_model(base, SaLoRAConfig(**options) if side == "out" else OrthoSafetyPatchConfig(**options, side="in"))
        leaves = [leaf for _, leaf in protected_leaves(model)]
        held = {id(leaf.basis): leaf.basis.numel() * 4 / 2**20 for leaf in leaves if leaf.basis is not None}
        every = sum(leaf.basis.numel() * 4 / 2**20 for leaf in leaves if leaf.basis is not None)
        seconds = interleaved(arms(model), args.rounds)
        facts = {"side": side, "device": device, "leaves": len(leaves), "bases MiB": sum(held.values()), "as copies MiB": every}
        rows.append({**facts, **medians(seconds), **{f"gain {arm}": ratio(seconds, "module by module", arm)[0] for arm in ("in place", "batched")}})
    show("one projection of every adapter", rows)
    print(f"written to {record('grouped', rows, environment(0, r=RANK, threads=torch.get_num_threads(), rounds=args.rounds))}")


if __name__ == "__main__":
    main()
