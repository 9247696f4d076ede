"""Commands on existing adapters: verify, recover, repair, audit, fuse, export."""

from __future__ import annotations

from dataclasses import asdict
from json import dumps
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Context, Option

from peft_safety.cli import options as opt
from peft_safety.cli.common import app, fail, print_facts, show
from peft_safety.errors import ConfigError, PeftSafetyError


@app.command()
def verify(
    directory: Annotated[Path, Argument(help="Adapter directory.")],
    model: Annotated[
        str | None, Option("--model", "-m", help="Also compare the base weights with this model.")
    ] = None,
    subspace: Annotated[
        str | None,
        Option(help="Check the blindness itself; of any other adapter: how much of its update lies in there."),
    ] = None,
    json: opt.Json = False,
) -> None:
    """Check that a directory holds a protected adapter, whole and unchanged. Exits with 1 if not."""
    from peft_safety.convert.verify import verify as check
    from peft_safety.recipes.load import load_model
    from peft_safety.reporting import verification

    base = None if model is None else load_model(model)[0]
    try:
        found = check(directory, base, subspace)
    except PeftSafetyError as error:
        fail(error, code=1)
    show(asdict(found), json, lambda: print_facts("Adapter: all checks passed", verification.facts(found)))


@app.command()
def recover(
    directory: Annotated[Path, Argument(help="Directory in which a save was interrupted.")], json: opt.Json = False
) -> None:
    """Finish a save that was interrupted while its files were moved into place. Files that this package did not write
    there are refused.
    """
    from peft_safety.core.publish import recover as finish

    moved = finish(directory)
    done = f"moved {', '.join(moved)}; the save is finished" if moved else "nothing to finish"
    show({"moved": moved}, json, f"{directory}: {done}")


@app.command()
def repair(
    context: Context,
    adapter: Annotated[Path, Argument(help="Directory of a trained LoRA adapter.")],
    method: Annotated[
        str, Option(help="safe_lora, or guardspace: take out what acts on the inputs that --subspace holds.")
    ] = "safe_lora",
    subspace: Annotated[str | None, Option(help="For guardspace: file, directory or Hub id.")] = None,
    unaligned: Annotated[
        str | None, Option(help="For safe_lora: directory or Hub id of the model before its alignment.")
    ] = None,
    aligned: Annotated[str | None, Option(help="Of the model after it; default: the adapter's base model.")] = None,
    out: Annotated[Path | None, Option(help="Directory for the repaired adapter.")] = None,
    select: Annotated[str, Option(help="Which modules: threshold, number or all.")] = "threshold",
    threshold: Annotated[float, Option(help="Repair modules with a smaller cosine.")] = 0.35,
    num_modules: Annotated[int | None, Option(help="For --select number: those with the smallest cosines.")] = None,
    projection: Annotated[str, Option(help="frobenius (as published), spectral, topk or soft.")] = "frobenius",
    rank: Annotated[int | None, Option("--safety-rank", help="Directions of topk and soft.")] = None,
    energy: Annotated[
        float | None, Option("--safety-energy", help="Instead: the share of the alignment's energy they hold.")
    ] = None,
    penalty: Annotated[float, Option(help="For soft: weight of the part outside.")] = 4.0,
    zero_delta: Annotated[str, Option(help="Modules that alignment left alone: error, keep or zero.")] = "error",
    allow_quantized_delta: Annotated[
        bool, Option("--allow-quantized-delta", help="Take the alignment from 4-bit or 8-bit weights.")
    ] = False,
    dry_run: opt.DryRun = False,
    png: Annotated[Path | None, Option(help="Draw the cosines here.")] = None,
    every: opt.EveryModule = False,
    json: opt.Json = False,
) -> None:
    """Repair a trained LoRA adapter, by Safe LoRA or by GuardSpace's null space: no data, no training, no model in
    memory.
    """
    options = locals()
    from peft_safety.methods.guardspace import repair_adapter
    from peft_safety.methods.safe_lora import safe_lora_dir
    from peft_safety.methods.safe_lora.config import OPTIONS
    from peft_safety.reporting import repair as report
    from peft_safety.reporting import style

    if out is None and not dry_run:
        raise ConfigError("repair writes nothing without --out. Give a directory, or --dry-run.")
    last = "--dry-run: no adapter written" if dry_run else f"repaired adapter written to {out}"
    needed = {"safe_lora": ("--unaligned", unaligned), "guardspace": ("--subspace", subspace)}
    others = {"safe_lora": ("subspace",), "guardspace": ("unaligned", "aligned", "png", *OPTIONS)}
    opt.refuse(context, others.get(method, ()), f"with --method {method}")
    if method not in needed or needed[method][1] is None:
        option = needed.get(method, ("--method safe_lora or guardspace",))[0]
        raise ConfigError(f"repair by {method} needs {option}.")
    if method == "guardspace":
        blind = repair_adapter(adapter, str(subspace), None if dry_run else out)
        show(blind.to_json(), json, lambda: report.show_blind(blind, every, dry_run), last)
        return
    chosen: dict[str, Any] = {name: options[name] for name in OPTIONS}
    if png is not None:
        style.check_png(png)
    result = safe_lora_dir(adapter, str(unaligned), aligned, None if dry_run else out, progress=not json, **chosen)
    show(result.to_json(), json, lambda: report.show(result, every), last)
    if png is not None:
        report.save_png(result, png)


@app.command()
def audit(
    adapter: Annotated[Path, Argument(help="Directory of a LoRA adapter, of this package or not.")],
    model: opt.AdapterModel = None,
    calibration: Annotated[str, Option(help="Inputs to measure on: none, or auto for the package's own.")] = "none",
    general: Annotated[Path | None, Option(help="Instead: JSON lines of harmless rows; needs --harmful.")] = None,
    harmful: Annotated[Path | None, Option(help="And of harmful requests with safe answers.")] = None,
    k: Annotated[int, Option(help="Directions of each weight behind the energy overlap.")] = 32,
    positions: opt.Positions = "response",
    png: Annotated[Path | None, Option(help="Draw layers by kinds of module here.")] = None,
    every: opt.EveryModule = False,
    json: opt.Json = False,
) -> None:
    """Compare an adapter's update with the weights under it and with chance, and measure what it does to general and
    harmful inputs.
    """
    from peft_safety.audit import orthogonality_report
    from peft_safety.data import read_jsonl
    from peft_safety.recipes.load import load_adapter
    from peft_safety.reporting import audit as report
    from peft_safety.reporting import style

    if calibration not in ("none", "auto"):
        raise ConfigError(f"--calibration {calibration!r}. Use none or auto, or give --general and --harmful.")
    data: Any = None if calibration == "none" else calibration
    if general is not None or harmful is not None:
        if general is None or harmful is None or data is not None:
            raise ConfigError("Give both --general and --harmful, two files, and no --calibration auto with them.")
        data = {"general": read_jsonl(general), "harmful": read_jsonl(harmful)}
    if png is not None:
        style.check_png(png)
    chosen: dict[str, Any] = {"calibration": data, "k": k, "positions": positions}
    loaded, tokenizer = load_adapter(adapter, model)
    result = orthogonality_report(loaded, tokenizer=tokenizer, **chosen)
    show(result.to_json(), json, lambda: report.show(result, every))
    if png is not None:
        report.save_png(result, png)


@app.command()
def fuse(
    config: Annotated[Path | None, Argument(help="YAML file of these settings; options override it.")] = None,
    safe: Annotated[
        str | None, Option(help="The safe adapter or checkpoint; without: the base model is aligned itself.")
    ] = None,
    tasks: Annotated[
        list[str] | None, Option("--task", help="Directory of a fine-tuned adapter or checkpoint; may be repeated.")
    ] = None,
    out: Annotated[str | None, Option(help="Directory for the result.")] = None,
    method: Annotated[str | None, Option(help="somf (a learned mask, default) or task_arithmetic (no mask).")] = None,
    weights: Annotated[list[float] | None, Option("--weight", help="Of the task vectors: once, or per task.")] = None,
    granularity: Annotated[str | None, Option(help="element, row, rank or module.")] = None,
    rescale: Annotated[str | None, Option(help="mean (as published) or none.")] = None,
    layout: Annotated[str | None, Option(help="auto, continued or independent.")] = None,
    export: Annotated[str | None, Option(help="threshold, topk or sample.")] = None,
    export_density: Annotated[float | None, Option(help="For topk.")] = None,
    seed: Annotated[int | None, Option(help="Seed of the noise and of training.")] = None,
    mask: Annotated[str | None, Option(help="File of trained masks or logits, instead of training.")] = None,
    model: Annotated[
        str | None, Option("--model", "-m", help="To train the mask on; default: the base model.")
    ] = None,
    data: Annotated[
        str | None, Option(help="JSON lines: {prompt, chosen, rejected}, or {prompt, response} for sft.")
    ] = None,
    objective: Annotated[str | None, Option(help="dpo or sft.")] = None,
    lr: Annotated[float | None, Option(help="Peak learning rate of the logits.")] = None,
    epochs: Annotated[float | None, Option(help="Passes over the rows.")] = None,
    max_steps: Annotated[int | None, Option(help="Optimizer steps; overrides --epochs when positive.")] = None,
    batch_size: Annotated[int | None, Option(help="Rows per step.")] = None,
    save_steps: Annotated[int | None, Option(help="Checkpoint every so many steps.")] = None,
    checkpoint_dir: Annotated[str | None, Option(help="Where; needed for --save-steps and --resume.")] = None,
    resume: Annotated[bool, Option("--resume", help="Go on from the last checkpoint.")] = False,
    report_to: Annotated[str | None, Option(help="As in TrainingArguments.")] = None,
    dry_run: opt.DryRun = False,
    every: opt.EveryModule = False,
    json: opt.Json = False,
) -> None:
    """Fuse a safe model with fine-tuned ones through a learned mask (SOMF), or without a mask (task arithmetic)."""
    flags = locals()
    from peft_safety.core.config_file import read_config
    from peft_safety.recipes.fusion import FuseJob
    from peft_safety.reporting.repair import show_fusion

    one_or_all = weights[0] if weights and len(weights) == 1 else weights or None
    flags |= {"tasks": tasks or None, "weights": one_or_all, "resume": resume or None}
    job = FuseJob.of({} if config is None else read_config(config), flags)
    result = job.plan() if dry_run else job.run(progress=not json)
    last = "nothing written: --dry-run" if dry_run else f"fused model written to {job.out}"
    show(result.to_json(), json, lambda: show_fusion(result, every), last)


@app.command()
def export(
    context: Context,
    directory: Annotated[Path, Argument(help="Directory of a protected adapter.")],
    out: Annotated[
        Path | None, Option(help="Directory for the plain LoRA, or for the merged model. Only --for can do without.")
    ] = None,
    server: Annotated[
        str | None,
        Option(
            "--for",
            help="vllm, sglang or llama.cpp: refuse what it does not take, and print the command that serves the "
            "adapter; without --out, a plain LoRA directory as it is.",
        ),
    ] = None,
    merge_to: Annotated[
        str | None,
        Option(
            help="Merge into the base model instead: 16bit (dense weights; the base is loaded as the adapter was "
            "trained), or in 4 bits: nf4+residual (exact: a plain LoRA beside it) or nf4 (lossy)."
        ),
    ] = None,
    model: opt.AdapterModel = None,
    load_in_4bit: Annotated[
        bool | None,
        Option(
            "--load-in-4bit/--no-load-in-4bit",
            help="For --merge-to: load the base in NF4, or not. Default for 16bit: as the adapter was trained, and "
            "not if that is unknown.",
        ),
    ] = None,
    force: Annotated[bool, Option("--force", help="For --merge-to nf4: although most of the update is lost.")] = False,
    every: opt.EveryModule = False,
    json: opt.Json = False,
) -> None:
    """Write a protected adapter as plain LoRA that any PEFT loads and that computes the same function, or merge it."""
    from peft_safety.convert.export import export_directory
    from peft_safety.convert.merge import merge_quantized
    from peft_safety.convert.serving import serving_commands
    from peft_safety.recipes.merging import load_for_merge

    if server is not None and merge_to is not None:
        raise ConfigError("--for serves an adapter, --merge-to makes a whole model. Give one of them.")
    if out is None and server is None:
        raise ConfigError("export writes nothing without --out. Give a directory.")
    if merge_to != "nf4":
        opt.refuse(context, ("force",), "without --merge-to nf4")
    if out is None or merge_to is None:
        opt.refuse(context, ("model", "load_in_4bit"), "without --merge-to")
        written = directory if out is None else export_directory(directory, out, server)
        commands = [] if server is None else serving_commands(written, server)
        lines = commands if out is None else [f"plain LoRA written to {out}", *commands]
        show({"out": str(written), "commands": commands}, json, *lines)
        return
    loaded, tokenizer, said = load_for_merge(directory, out, model, merge_to, load_in_4bit)
    result = merge_quantized(loaded, merge_to, force=force, verbose=False)  # type: ignore[arg-type]  # it refuses others
    for part in (result.model, tokenizer):
        part.save_pretrained(str(out))  # type: ignore[union-attr, operator]
    facts = {"base": said, **result.to_json()}
    (out / "merge.json").write_text(dumps(facts, indent=1) + "\n", encoding="utf-8")
    show(facts, json, said, lambda: result.print(every), f"written to {out}")
