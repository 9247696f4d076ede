"""What protection costs in training: one step (forward, backward, AdamW) of SaLoRA, plain LoRA and the dense
projection of the reference code.

One base model carries the three adapters, so that nothing but the active adapter differs; the arms run in turn. Peak
memory is that of a fresh process per arm. Run `python -m benchmarks.train_step` (about 15 minutes on two cores;
`--rounds 3 --base fp32` for a quick look).
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

from benchmarks.common import interleaved, medians, peak_memory, ratio, record, resident_mib, show
from peft_safety import SafetySubspace, SaLoRAConfig
from peft_safety.estimate.targets import target_layers
from peft_safety.projection import orthonormalize
from peft_safety.report import environment
from peft_safety.weights import shape

ARMS = ("lora", "salora", "dense C")
RANK, SAFETY_RANK = 16, 32
TARGET = 1.05
"""Largest ratio to plain LoRA, in time from 512 tokens on and in memory; and 1.5 is the smallest of the dense form to
ours.
"""


class DenseProjected(nn.Linear):
    """`lora_B` followed by a dense `C (m x m)` on the activations: the form of SaLoRA's reference code, re-implemented
    for comparison.
    """

    def __init__(self, linear: nn.Linear, basis: Tensor) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight = linear.weight
        self.register_buffer("complement", torch.eye(basis.shape[0]) - basis @ basis.mT, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.weight), self.complement)


def load(model_dir: str, base: str) -> nn.Module:
    """The real model in fp32, or NF4 with fp32 compute (bf16 is many times slower on a CPU)."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {"dtype": torch.float32}
    if base == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
    model: nn.Module = AutoModelForCausalLM.from_pretrained(model_dir, **options)
    return model


def any_subspace(model: nn.Module) -> SafetySubspace:
    """Random bases: what a step costs does not depend on where a basis comes from."""
    generator = torch.Generator().manual_seed(0)
    layers = target_layers(model, "all-linear")
    return SafetySubspace(
        {
            n: {"out": orthonormalize(torch.randn(shape(layer)[0], SAFETY_RANK, generator=generator))}
            for n, layer in layers.items()
        }
    )


def adapter_name(arm: str) -> str:
    """PEFT warns of names that its own prefix `lora_` contains."""
    return f"{arm.replace(' ', '_')}_arm"


def with_adapters(model: nn.Module, arms: tuple[str, ...]) -> PeftModel:
    """The model with one adapter an arm, of equal rank on all linear layers."""
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
    """One training step of an arm on `tokens` random tokens, as a function."""
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


def timings(model_dir: str, base: str, lengths: list[int], rounds: int) -> list[dict[str, Any]]:
    model = with_adapters(load(model_dir, base), ARMS).train()
    rows = []
    for tokens in lengths:
        seconds = interleaved({arm: step_of(model, arm, tokens) for arm in ARMS}, rounds)
        cost, low, high = ratio(seconds, "salora", "lora")
        gain, _, _ = ratio(seconds, "dense C", "salora")
        rows.append(
            {
                "base": base,
                "tokens": tokens,
                "rounds": rounds,
                **medians(seconds),
                "salora/lora": cost,
                "quartiles": f"{low:.3f}-{high:.3f}",
                "dense C/salora": gain,
            }
        )
        show("one training step", rows[-1:])
    return rows


def memory(model_dir: str, base: str, arm: str, tokens: int) -> None:
    """Child process: three steps of one arm, then what the process held at most."""
    model = with_adapters(load(model_dir, base), (arm,)).train()
    step = step_of(model, arm, tokens)
    for _ in range(3):
        step()
    print(json.dumps({"mib": resident_mib()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="model directory; default: the embedded SmolLM2-135M-Instruct")
    parser.add_argument("--base", choices=("fp32", "nf4"), action="append", help="default: both")
    parser.add_argument("--tokens", type=int, action="append", help="default: 128, 512 and 1024")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory-of", choices=ARMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    from examples.get_model import model_dir

    source, bases, lengths = (
        args.model or str(model_dir()),
        args.base or ["fp32", "nf4"],
        args.tokens or [128, 512, 1024],
    )
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
        found = {
            "base": base,
            **{f"{arm} MiB": peaks[arm] for arm in ARMS},
            "salora/lora": peaks["salora"] / peaks["lora"],
        }
        show("peak memory of the process, 512 tokens", [found])
        rows += [*timings(source, base, lengths, args.rounds), found]
    show("one training step, median of interleaved rounds", [row for row in rows if "tokens" in row])
    settings = {
        "model": "SmolLM2-135M-Instruct" if args.model is None else "given",
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
