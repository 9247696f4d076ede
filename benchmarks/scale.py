"""What GuardSpace costs at the sizes that people train: one to four decoder blocks of the shape of Llama-3-8B, random
NF4 weights, so that the cost of a block is a slope; extrapolated to whole models beside the targets.

Training: plain QLoRA, the frozen form, on request also on the fused path, and today's form with bases of n/16 and n/4,
some AdamW steps each, in a new process each. Calibration: by memory budget. Memory is the peak of the process.

    python -m benchmarks.scale [--blocks 1 2] [--tokens 256]     (half an hour on two cores; a GPU is used if there is
    one; --blocks 1 2 4 32 adds an 8B-shaped model in full, plain and frozen)
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import (
    parser_of,
    peak_memory,
    record,
    reset_peak,
    resident_mib,
    resident_now_mib,
    show,
)
from peft_safety import GuardSpaceConfig, SafetySubspace, verify
from peft_safety.core.base_weights import shape
from peft_safety.core.projection import orthonormalize
from peft_safety.core.targets import target_layers
from peft_safety.reporting.report import environment

FUSED = "frozen, fused"
ARMS = {"lora": None, "frozen": 16, FUSED: 16, "window": 16, "trained A, n/16": 16, "trained A, n/4": 4}
"""Arm -> one over the share of the input dimensions that its null space takes."""
MANY = 4
"""Blocks of the models that all arms and the calibration are measured on, at most."""
RANK = 16
STEPS = 3
MODELS = {"8B": 32, "32B": 64 * 1.9, "70B": 80 * 3.9}
"""Blocks of Llama-3-8B that weigh as much as all blocks of a model."""
BUDGETS = ("1GB", "4GB", "16GB")
CALIBRATION_TOKENS = 5000
SMALLER = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
}
"""The shape of Qwen2.5-1.5B, which has 28 blocks."""


def block_model(blocks: int, device: str, **changes: int) -> LlamaForCausalLM:
    """A language model of some blocks of Llama-3-8B's shape, quantized layer by layer, with a small vocabulary."""
    import bitsandbytes as bnb

    shapes = {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }
    shapes |= changes
    config = LlamaConfig(vocab_size=2048, num_hidden_layers=blocks, max_position_embeddings=2048, **shapes)
    compute = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    if device == "meta":
        return model
    generator = torch.Generator(device).manual_seed(0)
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]:
        m, n = shape(layer)
        weight = torch.randn(m, n, generator=generator, device=device) * 0.02
        new = bnb.nn.Linear4bit(n, m, bias=False, compute_dtype=compute, quant_type="nf4", device="meta")
        new.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4").to(device)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
    for module in model.modules():
        for key, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.is_meta:
                value = torch.ones(parameter.shape, device=device)
                if parameter.ndim == 2:
                    value.normal_(std=0.02, generator=generator)
                module._parameters[key] = nn.Parameter(value.to(compute), requires_grad=False)
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.is_loaded_in_4bit = True
    return model


def bases(model: nn.Module, share: int, device: str) -> SafetySubspace:
    """Random null spaces of `n / share` directions; one for the layers of a block that have the same input. Those of
    more than `MANY` blocks are the same in all blocks, which makes the file small: no arm with so many keeps them.
    """
    generator, made, result = torch.Generator(device).manual_seed(0), {}, {}
    many = len(model.model.layers) > MANY
    for name, layer in target_layers(model, "all-linear").items():
        n = shape(layer)[1]
        key = (None if many else name.rpartition(".")[0], n)
        if key not in made:
            drawn = torch.randn(n, n // share, generator=generator, device=device)
            made[key] = {"in": orthonormalize(drawn).cpu()}
        result[name] = made[key]
    return SafetySubspace(result)


def adapted(model: nn.Module, arm: str, folder: Path) -> Any:
    """The model under the adapter of an arm. Bases come from a file, as they do in real use."""
    common: dict[str, Any] = {"r": RANK, "lora_alpha": RANK, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    if ARMS[arm] is None:
        return get_peft_model(model, LoraConfig(**common))
    file = folder / f"bases-{ARMS[arm]}.safetensors"
    train: Any = {"frozen": "B", FUSED: "B", "window": "window"}.get(arm, "A")
    common |= {"subspace": str(file), "train": train, "a_init": "random", "fused": arm == FUSED}
    return get_peft_model(model, GuardSpaceConfig(**common))


def training(arm: str, blocks: int, tokens: int, steps: int, device: str, folder: Path) -> dict[str, Any]:
    """In a process of its own: peak memory, seconds a step, and the bytes of the saved adapter."""
    model = block_model(blocks, device)
    peft_model = adapted(model, arm, folder).train()
    optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(0, 2048, (1, tokens), generator=torch.Generator().manual_seed(0)).to(device)
    seconds = []
    reset(device)
    for _ in range(steps):
        started = time.perf_counter()
        peft_model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    peak = peak_mib(device)
    with tempfile.TemporaryDirectory() as saved:
        peft_model.save_pretrained(saved)
        size = sum(path.stat().st_size for path in Path(saved).rglob("*") if path.is_file())
    return {"peak MiB": peak, "step s": min(seconds), "adapter MiB": size / 2**20}


def calibration(budget: str, blocks: int, device: str) -> dict[str, Any]:
    """In a process of its own: memory beside the model, and seconds, of one calibration at n/16."""
    model = block_model(blocks, device)
    ids = torch.randint(0, 2048, (CALIBRATION_TOKENS // 40, 40), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": part, "labels": part} for part in ids.split(25)]
    reset(device)
    before, started = now_mib(device), time.perf_counter()
    options: dict[str, Any] = {"target_modules": "all-linear", "method": "guardspace", "progress": False}
    SafetySubspace.from_activations(model, data, rank=1 / 16, memory=budget, allow_fewer=True, **options)
    return {"seconds": time.perf_counter() - started, "beside the model MiB": peak_mib(device) - before}


def whole(device: str) -> dict[str, Any]:
    """A 1.5B-shaped model from calibration to a checked directory, A in the directions of the task. On a CPU the times
    are processor seconds.
    """
    model = block_model(28, device, **SMALLER)
    tokens = torch.randint(0, 2048, (96, 32), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": part, "labels": part} for part in tokens.split(16)]
    reset(device)
    clock = time.perf_counter if device == "cuda" else time.process_time
    before, started, spent = now_mib(device), clock(), {}
    options: dict[str, Any] = {"target_modules": "all-linear", "method": "guardspace", "progress": False}
    space = SafetySubspace.from_activations(model, batches[:4], rank=32, memory="4GB", allow_fewer=True, **options)
    spent["calibration s"] = clock() - started
    fields: dict[str, Any] = {"r": RANK, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    peft_model = get_peft_model(model, GuardSpaceConfig(**fields, subspace=space, task_data=batches[4:])).train()
    spent["injection s"] = clock() - started - spent["calibration s"]
    optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=1e-4)
    for batch in batches[4:5] * STEPS:
        ids = batch["input_ids"][:4].to(device)
        peft_model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    spent["3 steps s"] = clock() - started - sum(spent.values())
    with tempfile.TemporaryDirectory() as saved:
        peft_model.save_pretrained(saved)
        size = sum(path.stat().st_size for path in Path(saved).rglob("*") if path.is_file())
        leak = verify(saved, subspace=space).worst_leak
    return {**spent, "beside the model MiB": peak_mib(device) - before, "adapter MiB": size / 2**20, "leak": leak}


def reset(device: str) -> None:
    """Begin to measure the peak of memory."""
    reset_peak()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def peak_mib(device: str) -> float:
    """Since `reset`."""
    return torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else resident_mib()


def now_mib(device: str) -> float:
    """At this moment."""
    return torch.cuda.memory_allocated() / 2**20 if device == "cuda" else resident_now_mib()


def slopes(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per block and arm, from the smallest number of blocks and the largest that all arms have, and whole models
    beside plain QLoRA.
    """
    rows = [row for row in rows if row["blocks"] <= MANY]
    least, most = min(row["blocks"] for row in rows), max(row["blocks"] for row in rows)
    found = {(row["arm"], row["blocks"]): row for row in rows}
    result = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        low, high = found[arm, least], found[arm, most]
        slope = {key: (high[key] - low[key]) / (most - least) for key in ("peak MiB", "step s", "adapter MiB")}
        result.append({"arm": arm, **{f"{key} a block": value for key, value in slope.items()}})
    plain = result[0]
    for row in result:
        row["memory ratio"] = row["peak MiB a block"] / plain["peak MiB a block"]
        row["time ratio"] = row["step s a block"] / plain["step s a block"]
        row |= {f"adapter {name} MiB": row["adapter MiB a block"] * blocks for name, blocks in MODELS.items()}
    return result


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 2, 4])
    usual = [arm for arm in ARMS if arm != FUSED]
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=usual, metavar="ARM")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--steps", type=int, default=STEPS, help="of training; the fastest counts")
    parser.add_argument("--budgets", nargs="*", default=list(BUDGETS))
    parser.add_argument("--whole", action="store_true", help="a 1.5B-shaped model from calibration to verify; alone")
    parser.add_argument("--one", nargs=3, metavar=("KIND", "ARM", "BLOCKS"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    device, threads = "cuda" if torch.cuda.is_available() else "cpu", torch.get_num_threads()
    if args.whole:
        found = whole(device)
        show("a 1.5B-shaped model in NF4, rank 16, null spaces of 32", [found])
        print(f"written to {record('scale_whole', [found], environment(0, r=RANK, device=device, threads=threads))}")
        return
    if args.one:
        kind, arm, blocks = args.one
        found = (
            training(arm, int(blocks), args.tokens, args.steps, device, args.folder)
            if kind == "training"
            else calibration(arm, int(blocks), device)
        )
        print(json.dumps(found))
        return
    rows: list[dict[str, Any]] = []
    calibrations: list[dict[str, Any]] = []
    facts = environment(0, model="blocks of Llama-3-8B's shape, NF4", r=RANK, tokens=args.tokens, steps=args.steps)
    facts |= {"device": torch.cuda.get_device_name() if device == "cuda" else device}

    def keep(*summary: dict[str, Any]) -> Path:
        """All that is measured so far: a run that is cut short leaves its figures."""
        return record("scale", [*rows, *calibrations, *summary], facts)

    for blocks in args.blocks:
        with tempfile.TemporaryDirectory() as name:
            arms = [arm for arm in args.arms if blocks <= MANY or not arm.startswith("trained")]
            model = block_model(blocks, "meta")
            for share in sorted({share for arm in arms if (share := ARMS[arm]) is not None}):
                bases(model, share, device).save(Path(name, f"bases-{share}.safetensors"))
            sizes = ("--tokens", str(args.tokens), "--steps", str(args.steps), "--folder", name)
            for arm in arms:
                given = (*sizes, "--one", "training", arm, str(blocks))
                rows.append({"arm": arm, "blocks": blocks, **peak_memory("benchmarks.scale", *given)})
                show("training", rows[-1:])
                keep()
    for budget in args.budgets:
        blocks = max(blocks for blocks in args.blocks if blocks <= MANY)
        try:
            found = peak_memory("benchmarks.scale", "--one", "calibration", budget, str(blocks))
        except RuntimeError as error:
            found = {"seconds": None, "refused": str(error).strip().splitlines()[-1][-160:]}
        calibrations.append({"budget": budget, "blocks": blocks, **found})
        show("calibration", calibrations[-1:])
        keep()
    summary = slopes(rows) if len({blocks for blocks in args.blocks if blocks <= MANY}) > 1 else []
    if summary:
        show("a block, and the ratio to plain QLoRA", summary)
    path = keep(*summary)
    print(f"written to {path}; targets of the frozen form: memory <= 1.01, time <= 1.00, adapter <= 1.1 of plain")


if __name__ == "__main__":
    main()
