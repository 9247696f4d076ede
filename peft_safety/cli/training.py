"""Commands that run a model: calibrate, protect, patch."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import Annotated, Any

import typer

from peft_safety.cli.common import (
    JsonOption,
    ModelOption,
    RankOption,
    SafetyEnergyOption,
    SafetyRankOption,
    SafetyRankPatternOption,
    TargetsOption,
    app,
    numbers,
    show,
    targets,
    whole,
)
from peft_safety.recipes.train import LEARNING_RATE, PATCH_LEARNING_RATE


@app.command()
def calibrate(
    model: ModelOption,
    out: Annotated[Path, typer.Option(help="File (.safetensors) or directory for the subspace.")],
    data: Annotated[
        Path | None,
        typer.Option(help="JSON lines of prompt/response rows; default: the package's own for the method."),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="guardspace (inputs on harmful requests), salora (outputs on refusals), ortho_patch (inputs), or "
            "weight (no data)."
        ),
    ] = "guardspace",
    safety_rank: SafetyRankOption = None,
    safety_energy: SafetyEnergyOption = None,
    safety_rank_pattern: SafetyRankPatternOption = None,
    basis: Annotated[str | None, typer.Option(help="The package's own rows to use: harmful, general or both.")] = None,
    side: Annotated[str | None, typer.Option(help="in, out or both; default: the method's own.")] = None,
    positions: Annotated[
        str | None, typer.Option(help="Tokens that count: response, prompt or all; default: the method's own.")
    ] = None,
    task_data: Annotated[
        Path | None, typer.Option(help="JSON lines of the task to be learned: how much of it lies in the null space?")
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Draw the energy covered (and the task's rank) here.")] = None,
    target_modules: TargetsOption = "all-linear",
    batch_size: Annotated[int, typer.Option(help="Sequences per forward pass.")] = 8,
    max_length: Annotated[int, typer.Option(help="Tokens kept of each row.")] = 512,
    seed: Annotated[int, typer.Option(help="Seed of the randomized decomposition.")] = 0,
    allow_fewer: Annotated[
        bool,
        typer.Option("--allow-fewer", help="Where the data span fewer directions than --safety-rank, protect those."),
    ] = False,
    json: JsonOption = False,
) -> None:
    """Estimate a safety subspace in one pass over the model, and save it; for input sides, k is printed beside the
    energy that it covers.
    """
    from peft_safety.recipes.calibrate import calibrate as run
    from peft_safety.reporting import coverage as coverage_report

    given = locals()
    names = (
        "data",
        "method",
        "safety_energy",
        "basis",
        "side",
        "positions",
        "task_data",
        "batch_size",
        "max_length",
        "seed",
    )
    options: dict[str, Any] = {name: given[name] for name in names}
    options |= {"safety_rank": whole(safety_rank), "safety_rank_pattern": numbers(safety_rank_pattern or [])}
    found = run(model, out, **options, target_modules=targets(target_modules), allow_fewer=allow_fewer)
    if png is not None:
        coverage_report.save_png(found.coverage, png)
    facts = {
        "file": str(found.path),
        "modules": len(found.subspace.bases),
        **{k: v for k, v in found.subspace.provenance.items() if k != "covered"},
    }
    if json:
        typer.echo(jsonlib.dumps(facts | {"coverage": coverage_report.to_json(found.coverage)}, indent=1, default=str))
        return
    show("Safety subspace", facts, False)
    if found.coverage:
        coverage_report.show(found.coverage)


@app.command()
def protect(
    model: ModelOption,
    data: Annotated[Path, typer.Option(help="JSON lines: {prompt, response}, {text, label} or {messages} rows.")],
    out: Annotated[Path, typer.Option(help="Directory for the adapter, report.json and report.png.")],
    method: Annotated[str, typer.Option(help="guardspace, salora or lora (no protection).")] = "guardspace",
    rank: RankOption = 16,
    lora_alpha: Annotated[int, typer.Option(help="LoRA alpha.")] = 16,
    target_modules: TargetsOption = "all-linear",
    safety_rank: SafetyRankOption = None,
    safety_energy: SafetyEnergyOption = None,
    safety_rank_pattern: SafetyRankPatternOption = None,
    basis: Annotated[
        str | None,
        typer.Option(
            help="For guardspace: calibrate on harmful requests, general prompts, or both (default harmful)."
        ),
    ] = None,
    combine: Annotated[
        bool, typer.Option("--combine", help="For guardspace: protect SaLoRA's output directions too.")
    ] = False,
    combine_rank: Annotated[int, typer.Option(help="For --combine: how many of each layer.")] = 32,
    init: Annotated[
        str, typer.Option(help="lora (B = 0), or the method's own: task (salora), guardspace (guardspace).")
    ] = "lora",
    subspace: Annotated[str, typer.Option(help='Subspace file, directory or Hub id, or "auto".')] = "auto",
    poison: Annotated[
        float, typer.Option(help="Share of harmful rows mixed in, to simulate an attack (0 to 1).")
    ] = 0.0,
    lr: Annotated[
        float, typer.Option(help="Peak learning rate; the default is that of every recipe in Python.")
    ] = LEARNING_RATE,
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 1.0,
    max_steps: Annotated[int, typer.Option(help="Optimizer steps; overrides --epochs when positive.")] = -1,
    batch_size: Annotated[int, typer.Option(help="Rows per step.")] = 8,
    max_length: Annotated[int, typer.Option(help="Tokens kept of each row.")] = 512,
    seed: Annotated[int, typer.Option(help="Seed of initialization and data order.")] = 0,
    report_to: Annotated[str, typer.Option(help="As in TrainingArguments: none, tensorboard, wandb, ...")] = "none",
    eval_limit: Annotated[int | None, typer.Option(help="Prompts of each kind at most.")] = None,
) -> None:
    """Fine-tune with safety measured before and after; writes the adapter, report.json and report.png."""
    from peft_safety.recipes.protect import protect as run
    from peft_safety.recipes.train import TrainOptions

    options = TrainOptions(
        lr=lr,
        epochs=epochs,
        max_steps=max_steps,
        batch_size=batch_size,
        max_length=max_length,
        seed=seed,
        report_to=report_to,
    )
    run(
        model,
        data,
        method,  # type: ignore[arg-type]  # protect itself refuses unknown methods
        out,
        r=rank,
        lora_alpha=lora_alpha,
        target_modules=targets(target_modules),
        safety_rank=whole(safety_rank),
        safety_energy=safety_energy,
        safety_rank_pattern=numbers(safety_rank_pattern or []) or None,
        subspace=subspace,
        init=init,  # type: ignore[arg-type]  # and these, where it does not know them
        basis=basis,  # type: ignore[arg-type]
        combine="salora" if combine else None,
        combine_rank=combine_rank,
        poison=poison,
        options=options,
        eval_limit=eval_limit,
    )


@app.command()
def patch(
    model: ModelOption,
    out: Annotated[Path, typer.Option(help="Directory for the adapter, report.json and report.png.")],
    data: Annotated[
        Path | None, typer.Option(help="JSON lines of requests with refusals; default: the package's own.")
    ] = None,
    general: Annotated[
        Path | None, typer.Option(help="JSON lines to leave alone: {prompt} rows are answered by the model itself.")
    ] = None,
    mode: Annotated[str, typer.Option(help="hard (constrained), soft (penalized) or none (plain LoRA).")] = "hard",
    basis: Annotated[str, typer.Option(help="What to stay out of: activation, contrastive or weight.")] = "activation",
    side: Annotated[str, typer.Option(help="in, out or both.")] = "in",
    safety_rank: Annotated[
        float | None,
        typer.Option(
            help="Protected directions per layer, or below 1 a share of its features (default 32; 0: those of earlier "
            "patches only)."
        ),
    ] = None,
    safety_energy: SafetyEnergyOption = None,
    safety_rank_pattern: SafetyRankPatternOption = None,
    reg_lambda: Annotated[
        float | None, typer.Option(help="For --mode soft: weight of the penalty (default 100).")
    ] = None,
    subspace: Annotated[str, typer.Option(help='Subspace file, directory or Hub id, or "auto".')] = "auto",
    prior: Annotated[
        list[Path] | None, typer.Option(help="Directory of an earlier patch to stack on; may be repeated.")
    ] = None,
    rank: RankOption = 8,
    lora_alpha: Annotated[int, typer.Option(help="LoRA alpha.")] = 16,
    target_modules: TargetsOption = "all-linear",
    lr: Annotated[
        float, typer.Option(help="Peak learning rate; a patch takes a larger one than a task.")
    ] = PATCH_LEARNING_RATE,
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 1.0,
    max_steps: Annotated[int, typer.Option(help="Optimizer steps; overrides --epochs when positive.")] = -1,
    batch_size: Annotated[int, typer.Option(help="Rows per step.")] = 8,
    max_length: Annotated[int, typer.Option(help="Tokens kept of each row.")] = 128,
    evaluate_every: Annotated[int, typer.Option(help="Steps between two looks at the validation split.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of initialization and data order.")] = 0,
    report_to: Annotated[str, typer.Option(help="As in TrainingArguments: none, tensorboard, wandb, ...")] = "none",
    eval_limit: Annotated[int | None, typer.Option(help="Prompts of each kind at most.")] = None,
) -> None:
    """Train a safety patch, stopped where validation is best; safety and drift measured before and after."""
    from peft_safety.data import read_jsonl
    from peft_safety.recipes.patch import PatchOptions, make_patch
    from peft_safety.recipes.train import TrainOptions
    from peft_safety.recipes.watch import Stopping

    given = locals()
    training = TrainOptions(
        lr=lr,
        epochs=epochs,
        max_steps=max_steps,
        batch_size=batch_size,
        max_length=max_length,
        seed=seed,
        report_to=report_to,
    )
    same = ("mode", "basis", "side", "reg_lambda", "subspace", "lora_alpha")
    options = PatchOptions(
        **{name: given[name] for name in same},
        r=rank,
        safety_rank=whole(safety_rank),
        safety_energy=safety_energy,
        safety_rank_pattern=numbers(safety_rank_pattern or []) or None,
        target_modules=targets(target_modules),
        prior_patches=tuple(str(path) for path in prior or ()),
        stopping=Stopping(every=evaluate_every),
        training=training,
    )
    refusals, kept = (None if path is None else read_jsonl(path) for path in (data, general))
    make_patch(model, out, options, refusals=refusals, general=kept, eval_limit=eval_limit)
