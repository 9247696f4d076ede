"""Commands on adapters that are there: verify, recover, repair, audit, fuse, export."""

from __future__ import annotations

import json as jsonlib
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from peft_safety.cli.common import JsonOption, app, calibration_sets, fail, show


@app.command()
def verify(
    directory: Annotated[Path, typer.Argument(help="Adapter directory.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Also compare the base weights with this model.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Check that a directory holds a protected adapter, whole and unchanged. Exits with 1 if not."""
    from peft_safety.convert.verify import verify as check
    from peft_safety.errors import PeftSafetyError

    base = None
    if model is not None:
        from peft_safety.recipes.load import load_model

        base, _ = load_model(model)
    try:
        found = check(directory, base)
    except PeftSafetyError as error:
        fail(error, code=1)
    show("Adapter: all checks passed", asdict(found), json)


@app.command()
def recover(
    directory: Annotated[Path, typer.Argument(help="Directory that a save was interrupted in.")],
    json: JsonOption = False,
) -> None:
    """Finish a save that was cut off while its files were moved into place. Refuses what this package did not write
    there.
    """
    from peft_safety.core.publish import recover as finish

    moved = finish(directory)
    if json:
        typer.echo(jsonlib.dumps({"moved": moved}))
        return
    typer.echo(
        f"{directory}: moved {', '.join(moved)}; the save is finished" if moved else f"{directory}: nothing to finish"
    )


@app.command()
def repair(
    adapter: Annotated[Path, typer.Argument(help="Directory of a trained LoRA adapter.")],
    unaligned: Annotated[str, typer.Option(help="Directory or Hub id of the model before its alignment.")],
    aligned: Annotated[
        str | None, typer.Option(help="Of the model after it; default: the adapter's base model.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Directory for the repaired adapter.")] = None,
    select: Annotated[str, typer.Option(help="Which modules: threshold, number or all.")] = "threshold",
    threshold: Annotated[float, typer.Option(help="Repair modules with a smaller cosine.")] = 0.35,
    num_modules: Annotated[
        int | None, typer.Option(help="For --select number: the modules with the smallest cosines.")
    ] = None,
    projection: Annotated[str, typer.Option(help="frobenius (as published), spectral, topk or soft.")] = "frobenius",
    safety_rank: Annotated[int | None, typer.Option(help="Directions of topk and soft.")] = None,
    safety_energy: Annotated[
        float | None, typer.Option(help="Instead of --safety-rank: the share of the alignment's energy they hold.")
    ] = None,
    penalty: Annotated[float, typer.Option(help="For soft: weight of the part outside.")] = 4.0,
    zero_delta: Annotated[str, typer.Option(help="Modules that alignment left alone: error, keep or zero.")] = "error",
    allow_quantized_delta: Annotated[
        bool, typer.Option("--allow-quantized-delta", help="Take the alignment from 4-bit or 8-bit weights.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only report; --out is not written.")] = False,
    png: Annotated[Path | None, typer.Option(help="Draw the cosines here.")] = None,
    json: JsonOption = False,
) -> None:
    """Repair a trained LoRA adapter by Safe LoRA: no data, no training, no model in memory."""
    from peft_safety.errors import ConfigError
    from peft_safety.methods.safe_lora import safe_lora_dir
    from peft_safety.methods.safe_lora.config import OPTIONS
    from peft_safety.reporting.repair import save_png, table

    if out is None and not dry_run:
        raise ConfigError("repair writes nothing without --out. Give a directory, or --dry-run.")
    given = {**locals(), "rank": safety_rank, "energy": safety_energy}
    found = safe_lora_dir(
        adapter,
        unaligned,
        aligned,
        None if dry_run else out,
        progress=not json,
        **{name: given[name] for name in OPTIONS},
    )
    if png is not None:
        save_png(found, png)
    if json:
        typer.echo(jsonlib.dumps(found.to_json(), indent=1))
        return
    from rich.console import Console

    Console().print(table(found))
    typer.echo(
        f"nothing written: --dry-run{'' if png is None else f' (picture: {png})'}"
        if dry_run
        else f"repaired adapter written to {out}"
    )


@app.command()
def audit(
    adapter: Annotated[Path, typer.Argument(help="Directory of a LoRA adapter, of this package or not.")],
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="Hub id or directory of the base model; default: the one the adapter names."
        ),
    ] = None,
    calibration: Annotated[
        str, typer.Option(help="Inputs for the functional part: none, or auto for the package's own.")
    ] = "none",
    general: Annotated[
        Path | None, typer.Option(help="Instead: JSON lines of harmless prompt/response rows; needs --harmful.")
    ] = None,
    harmful: Annotated[Path | None, typer.Option(help="And of harmful requests with safe answers.")] = None,
    k: Annotated[int, typer.Option(help="Directions of each weight behind the energy overlap.")] = 32,
    positions: Annotated[str, typer.Option(help="Tokens that count: response, prompt or all.")] = "response",
    png: Annotated[Path | None, typer.Option(help="Draw layers by kinds of module here.")] = None,
    every: Annotated[
        bool, typer.Option("--all", help="One row a module instead of medians by kind of module.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """How an adapter's update lies in relation to the weights under it, beside chance; and what it does to general and
    harmful inputs.
    """
    from peft_safety.audit import orthogonality_report
    from peft_safety.recipes.load import load_adapter
    from peft_safety.reporting.audit import save_png, show

    data = calibration_sets(calibration, general, harmful)
    loaded, tokenizer = load_adapter(adapter, model)
    found = orthogonality_report(loaded, calibration=data, tokenizer=tokenizer, k=k, positions=positions)  # type: ignore[arg-type]  # it refuses others
    if png is not None:
        save_png(found, png)
    typer.echo(jsonlib.dumps(found.to_json(), indent=1, allow_nan=False)) if json else show(found, every)


@app.command()
def fuse(
    config: Annotated[
        Path | None,
        typer.Argument(help="YAML file of the settings below (tasks: [...], train: {...}); flags override it."),
    ] = None,
    safe: Annotated[
        str | None,
        typer.Option(help="Directory of the safe adapter or checkpoint; without: the base model is aligned itself."),
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="Directory of a fine-tuned adapter or checkpoint; repeat for more.")
    ] = None,
    out: Annotated[str | None, typer.Option(help="Directory for the result.")] = None,
    method: Annotated[
        str | None, typer.Option(help="somf (a learned mask, default) or task_arithmetic (without a mask).")
    ] = None,
    weight: Annotated[
        list[float] | None, typer.Option(help="Weight of the task vectors: once, or once a task.")
    ] = None,
    granularity: Annotated[str | None, typer.Option(help="element, row, rank or module.")] = None,
    rescale: Annotated[str | None, typer.Option(help="mean (as published) or none.")] = None,
    layout: Annotated[str | None, typer.Option(help="auto, continued or independent.")] = None,
    export: Annotated[str | None, typer.Option(help="threshold, topk or sample.")] = None,
    export_density: Annotated[float | None, typer.Option(help="For topk.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the noise and of training.")] = None,
    mask: Annotated[str | None, typer.Option(help="File of trained masks or logits, instead of training.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="To train the mask on; default: the adapters' base model.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="JSON lines: {prompt, chosen, rejected}, or {prompt, response} for sft; default: the package's own."
        ),
    ] = None,
    objective: Annotated[str | None, typer.Option(help="dpo or sft.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate of the logits.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the rows.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer steps; overrides --epochs when positive.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows per step.")] = None,
    save_steps: Annotated[int | None, typer.Option(help="Checkpoint every so many steps.")] = None,
    checkpoint_dir: Annotated[str | None, typer.Option(help="Where; needed for --save-steps and --resume.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    report_to: Annotated[str | None, typer.Option(help="As in TrainingArguments.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the plan.")] = False,
    json: JsonOption = False,
) -> None:
    """Fuse a safe model with fine-tuned ones through a learned mask (SOMF), or without a mask (task arithmetic)."""
    given = locals()
    from peft_safety.recipes.fusion import OPTIONS, PLACES, TRAINING, FuseJob, read_config
    from peft_safety.reporting.fusion import table

    given |= {
        "tasks": task or None,
        "weights": (weight if len(weight) > 1 else weight[0]) if weight else None,
        "resume": resume or None,
    }
    flags = {name: given.get(name) for name in (*PLACES, *OPTIONS)}
    job = FuseJob.of(
        {} if config is None else read_config(config), flags, {name: given.get(name) for name in TRAINING}
    )
    found = job.plan() if dry_run else job.run(progress=not json)
    if json:
        typer.echo(jsonlib.dumps(found.to_json(), indent=1))
        return
    from rich.console import Console

    Console().print(table(found))
    typer.echo("nothing written: --dry-run" if dry_run else f"fused model written to {job.out}")


@app.command()
def export(
    directory: Annotated[Path, typer.Argument(help="Directory of a protected adapter.")],
    out: Annotated[Path, typer.Option(help="Directory for the plain LoRA, or for the merged model.")],
    merge_to: Annotated[
        str | None,
        typer.Option(
            help="Merge into the base model, loaded in 4 bits, instead: 16bit, nf4+residual (exact: a plain LoRA "
            "beside it) or nf4 (lossy)."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="For --merge-to: the base model; default: the one the adapter names."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="For --merge-to nf4: although most of the update is lost.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Write a protected adapter as plain LoRA that any PEFT loads and that computes the same function, or merge it."""
    if merge_to is None:
        from peft_safety.convert.export import export_directory

        written = export_directory(directory, out)
        typer.echo(jsonlib.dumps({"out": str(written)}) if json else f"plain LoRA written to {written}")
        return
    from peft_safety.recipes.merge import merge_directory

    found = merge_directory(directory, out, merge_to, model, force=force)  # type: ignore[arg-type]  # it refuses others
    if json:
        typer.echo(jsonlib.dumps(found.to_json(), indent=1))
        return
    found.print()
    typer.echo(f"written to {out}")
