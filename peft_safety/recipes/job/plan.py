"""What a job will take, before it runs: from the rows, and from the model's shapes without its weights."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from peft_safety.calibration.sizes import DEFAULT_RANK, GUARDSPACE_SIZE, Size
from peft_safety.core import base_weights as weights
from peft_safety.core.missing import not_found
from peft_safety.core.names import kind_of
from peft_safety.core.targets import target_layers
from peft_safety.errors import ConfigError
from peft_safety.recipes.job.job import Job
from peft_safety.recipes.job.options import STEPS
from peft_safety.recipes.job.settings import Settings
from peft_safety.reporting import render
from peft_safety.reporting.coverage import size_text

SAMPLE = 256
"""Rows whose tokens are counted; the others are taken to be as long."""
ACTIVATION_BYTES = 34
"""Of a transformer layer, a token and a unit of width at 2 bytes a number: arXiv 2205.05198, section 4.1."""
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
BITS_4, BITS_8 = 0.5 + 4 / 64, 1.0
"""Bytes of a quantized weight; in 4 bits with a scale for each block of 64."""
RANKS, SHARES = (8, 16, 32, 64), (0.125, 0.25, 0.5)
"""Sizes whose costs are compared, beside those asked for."""


@dataclass(frozen=True)
class Plan:
    """Facts by name; cost of each LoRA rank and of each subspace size, as rows of a table."""

    facts: dict[str, str]
    ranks: list[list[str]]
    subspaces: list[list[str]]


def make_plan(settings: Settings) -> Plan:
    """The plan of a job. Reads the rows and the model's config; loads no weights and writes nothing."""
    job = Job(settings)
    given, training = settings.model, settings.training
    try:
        where = {"revision": given.model_revision, "trust_remote_code": training.trust_remote_code}
        config = AutoConfig.from_pretrained(given.model_name_or_path, **where)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError) as error:
        raise ConfigError(not_found("model", given.model_name_or_path, error)) from error
    packed = not job.protected or "out" not in job.config.basis_sides
    targets = target_layers(
        model, job.config.target_modules, target_parameters=job.config.target_parameters, packed=packed
    )
    shapes = {name: weights.shape(layer) for name, layer in targets.items()}
    kinds = Counter(map(kind_of, shapes))
    trained = _trainable(job, shapes, given.lora_r)
    whole = sum(parameter.numel() for parameter in model.parameters())
    facts = {
        "rows": f"{len(job.data.train)} to train on, {len(job.data.held_out or ())} held out",
        **({"without an answer": job.note} if job.note else {}),
        **_work(job),
        "method": f"{settings.own.method}{_form(job)}, r={given.lora_r}, lora_alpha={given.lora_alpha}",
        "modules": f"{len(shapes)}: " + ", ".join(f"{count} {kind}" for kind, count in kinds.items()),
        "trainable parameters": f"{trained:,} of {whole:,} ({trained / whole:.2%})",
        **_memory(job, model, config.get_text_config(), shapes),
        "steps of the job": ", ".join(step for step in STEPS if step not in (settings.own.skip or ())),
    }
    ranks = [
        [str(r), f"{(count := _trainable(job, shapes, r)):,}", size_text(16 * count)]
        for r in sorted({*RANKS, given.lora_r})
    ]
    return Plan(facts, ranks, _subspaces(job, shapes) if job.protected and settings.own.subspace == "auto" else [])


def show_plan(plan: Plan) -> None:
    """Print the plan as tables."""
    tables = [render.table(["", ""], [[name, value] for name, value in plan.facts.items()], prose=[1])]
    tables.append(render.table(["lora_r", "trainable", "with gradients and Adam"], plan.ranks))
    if plan.subspaces:
        tables.append(render.table(["safety_rank", "directions", "subspace file, at most"], plan.subspaces))
    render.show("Plan of the job (nothing trained, nothing written)", *tables, notes=["Memory is an estimate."])


def _work(job: Job) -> dict[str, str]:
    training, rows = job.training, len(job.data.train)
    lengths = [len(feature["input_ids"]) for feature in job.features(SAMPLE)]
    tokens = round(sum(lengths) / len(lengths) * rows)
    sequences = math.ceil(tokens / training.max_length) if training.packing else rows
    batches = math.ceil(sequences / (training.per_device_train_batch_size * training.world_size))
    steps = math.ceil(math.ceil(batches / training.gradient_accumulation_steps) * training.num_train_epochs)
    steps = training.max_steps if training.max_steps > 0 else steps
    parts = f"{training.per_device_train_batch_size} rows, {training.gradient_accumulation_steps} accumulated"
    return {
        "tokens": f"about {tokens:,} an epoch; {sum(lengths) / len(lengths):.0f} a row, at most {max(lengths)}",
        "steps": f"{steps} of {parts}, {training.world_size} process{'es' if training.world_size > 1 else ''}",
    }


def _form(job: Job) -> str:
    return f", train={job.config.train}" if job.own.method == "guardspace" else ""


def _trainable(job: Job, shapes: dict[str, tuple[int, int]], r: int) -> int:
    frozen = job.protected and job.config.freezes
    return sum(r * (m if frozen else m + n) for m, n in shapes.values())


def _memory(job: Job, model: Any, config: Any, shapes: dict[str, tuple[int, int]]) -> dict[str, str]:
    """See docs/guides/several_gpus.md for the formula."""
    given, training = job.settings.model, job.training
    number = BYTES.get(str(given.dtype), BYTES["bfloat16"])
    small = BITS_4 if given.load_in_4bit else BITS_8 if given.load_in_8bit else number
    head = model.get_output_embeddings()
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head)
    base = small * linear + number * (sum(p.numel() for p in model.parameters()) - linear)
    lengths = [len(feature["input_ids"]) for feature in job.features(SAMPLE)]
    width = training.max_length if training.packing else max(lengths)
    tokens, layers = training.per_device_train_batch_size * width, config.num_hidden_layers
    half = 2 if training.bf16 or training.fp16 else number
    trained, features = _trainable(job, shapes, given.lora_r), sum(n for _, n in shapes.values())
    frozen = job.protected and job.config.freezes
    inputs = 0 if frozen else 4 * features / layers  # in fp32, for the gradient of a trained lora_A
    one = tokens * (ACTIVATION_BYTES * half / 2 * config.hidden_size + inputs)
    kept = one + layers * half * tokens * config.hidden_size if training.gradient_checkpointing else layers * one
    if training.label_smoothing_factor:  # else TRL makes the logits of a few tokens at a time
        kept += 4 * tokens * config.vocab_size
    # fp32: the parameter, and if it is trained its gradient and two moments of Adam
    adapter = 16 * trained + (4 * given.lora_r * features if frozen else 0)
    return {
        "memory of the base": size_text(round(base)),
        "memory of the adapter": f"{size_text(adapter)}, gradients and optimizer included",
        "memory of activations": f"about {size_text(round(kept))}",
        "memory in all": f"about {size_text(round(base + adapter + kept))} a process",
    }


def _subspaces(job: Job, shapes: dict[str, tuple[int, int]]) -> list[list[str]]:
    """For each size: directions of the module with the most and with the fewest, and bytes."""
    config: Any = job.config
    guard = job.own.method == "guardspace"
    asked: Any = config.safety_rank or (GUARDSPACE_SIZE[0] if guard else DEFAULT_RANK)
    side: Any = "in" if guard else "out"
    rows = []
    for rank in sorted({*SHARES, asked}):
        patterned = config.safety_rank_pattern if rank == asked and config.safety_energy is None else {}
        sizes = {name: Size.of((patterned or {}).get(kind_of(name), rank)) for name in shapes}
        counts = {name: sizes[name].limit(shape, side) for name, shape in shapes.items()}
        stored = sum(2 * k * shapes[name][1 if guard else 0] for name, k in counts.items())
        most = " (at most, by the energy)" if rank == asked and config.safety_energy else ""
        rows.append([f"{rank:g}", f"{min(counts.values())} to {max(counts.values())}{most}", size_text(stored)])
    return rows
