"""The command line. Every command is one library call; heavy imports wait until a command runs, so that `--help` answers at once."""

from __future__ import annotations

import json as jsonlib
import logging
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="LoRA fine-tuning that keeps a model's safety alignment.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ModelOption = Annotated[str, typer.Option("--model", "-m", help="Hub id or directory of the base model.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
TargetsOption = Annotated[str, typer.Option(help='"all-linear", names separated by commas, or one regular expression.')]


@app.command()
def calibrate(
    model: ModelOption,
    out: Annotated[Path, typer.Option(help="File (.safetensors) or directory for the subspace.")],
    data: Annotated[Path | None, typer.Option(help="JSON lines of prompt/response rows; default: the package's own for the method.")] = None,
    method: Annotated[
        str, typer.Option(help="salora (outputs on refusals), guardspace (inputs on them), ortho_patch (inputs), or weight (no data).")
    ] = "salora",
    rank: Annotated[float | None, typer.Option(help="Directions per layer, or below 1 a share of its features (default 32; guardspace: 0.25).")] = None,
    energy: Annotated[float | None, typer.Option(help="Instead of --rank: as many directions as hold this share of the energy.")] = None,
    per_kind: Annotated[list[str] | None, typer.Option(help="Another --rank or --energy for a kind of module: down_proj=0.1; may be repeated.")] = None,
    basis: Annotated[str | None, typer.Option(help="The package's own rows to use: harmful, general or both.")] = None,
    side: Annotated[str | None, typer.Option(help="in, out or both; default: the method's own.")] = None,
    positions: Annotated[str | None, typer.Option(help="Tokens that count: response, prompt or all; default: the method's own.")] = None,
    task: Annotated[Path | None, typer.Option(help="JSON lines of the task to be learned: how much of it lies in the null space?")] = None,
    png: Annotated[Path | None, typer.Option(help="Draw the energy covered (and the task's rank) here.")] = None,
    target_modules: TargetsOption = "all-linear",
    batch_size: Annotated[int, typer.Option(help="Sequences per forward pass.")] = 8,
    max_length: Annotated[int, typer.Option(help="Tokens kept of each row.")] = 512,
    seed: Annotated[int, typer.Option(help="Seed of the randomised decomposition.")] = 0,
    allow_fewer: Annotated[bool, typer.Option("--allow-fewer", help="Where the data span fewer directions than --rank, protect those.")] = False,
    json: JsonOption = False,
) -> None:
    """Estimate a safety subspace in one pass over the model, and save it; for input sides, k is printed beside the energy that it covers."""
    from peft_safety import coverage_report
    from peft_safety.recipes.calibrate import calibrate as run

    given = locals()
    size: dict[str, Any] = {"rank": rank if rank is None or rank < 1 or rank % 1 else int(rank), "per_kind": _numbers(per_kind or [])}
    options: dict[str, Any] = {
        name: given[name] for name in ("data", "method", "energy", "basis", "side", "positions", "task", "batch_size", "max_length", "seed")
    }
    found = run(model, out, **size, **options, target_modules=_targets(target_modules), allow_fewer=allow_fewer)
    if png is not None:
        coverage_report.save_png(found.coverage, png)
    facts = {"file": str(found.path), "modules": len(found.subspace.bases), **{k: v for k, v in found.subspace.provenance.items() if k != "covered"}}
    if json:
        typer.echo(jsonlib.dumps(facts | {"coverage": coverage_report.to_json(found.coverage)}, indent=1, default=str))
        return
    _show("Safety subspace", facts, False)
    if found.coverage:
        coverage_report.show(found.coverage)


@app.command()
def protect(
    model: ModelOption,
    data: Annotated[Path, typer.Option(help="JSON lines: {prompt, response}, {text, label} or {messages} rows.")],
    out: Annotated[Path, typer.Option(help="Directory for the adapter, report.json and report.png.")],
    method: Annotated[str, typer.Option(help="lora, salora or guardspace.")] = "salora",
    r: Annotated[int, typer.Option(help="LoRA rank.")] = 16,
    lora_alpha: Annotated[int, typer.Option(help="LoRA alpha.")] = 16,
    target_modules: TargetsOption = "all-linear",
    safety_rank: Annotated[int, typer.Option(help="Protected output directions per layer.")] = 32,
    basis: Annotated[str | None, typer.Option(help="For guardspace: calibrate on harmful requests, general prompts, or both (default harmful).")] = None,
    fraction: Annotated[float | None, typer.Option(help="For guardspace: share of each layer's input dimensions that is protected (default 0.25).")] = None,
    combine: Annotated[bool, typer.Option("--combine", help="For guardspace: protect SaLoRA's output directions too.")] = False,
    init: Annotated[str, typer.Option(help="lora (B = 0), or the method's own: task (salora), guardspace (guardspace).")] = "lora",
    subspace: Annotated[str, typer.Option(help='Subspace file, directory or Hub id, or "auto".')] = "auto",
    poison: Annotated[float, typer.Option(help="Share of harmful rows mixed in, to simulate an attack (0 to 1).")] = 0.0,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-4,
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 1.0,
    max_steps: Annotated[int, typer.Option(help="Optimizer steps; overrides --epochs when positive.")] = -1,
    batch_size: Annotated[int, typer.Option(help="Rows per step.")] = 8,
    max_length: Annotated[int, typer.Option(help="Tokens kept of each row.")] = 512,
    seed: Annotated[int, typer.Option(help="Seed of initialisation and data order.")] = 0,
    report_to: Annotated[str, typer.Option(help="As in TrainingArguments: none, tensorboard, wandb, ...")] = "none",
    eval_limit: Annotated[int | None, typer.Option(help="Prompts of each kind at most.")] = None,
) -> None:
    """Fine-tune with safety measured before and after; writes the adapter, report.json and report.png."""
    from peft_safety.recipes.protect import protect as run
    from peft_safety.recipes.train import TrainOptions

    options = TrainOptions(lr=lr, epochs=epochs, max_steps=max_steps, batch_size=batch_size, max_length=max_length, seed=seed, report_to=report_to)
    run(
        model,
        data,
        method,  # type: ignore[arg-type]  # protect itself refuses unknown methods
        out,
        r=r,
        lora_alpha=lora_alpha,
        target_modules=_targets(target_modules),
        safety_rank=safety_rank,
        subspace=subspace,
        init=init,  # type: ignore[arg-type]  # and these, where it does not know them
        basis=basis,  # type: ignore[arg-type]
        fraction=fraction,
        combine="salora" if combine else None,
        poison=poison,
        options=options,
        eval_limit=eval_limit,
    )


@app.command()
def patch(
    model: ModelOption,
    out: Annotated[Path, typer.Option(help="Directory for the adapter, report.json and report.png.")],
    data: Annotated[Path | None, typer.Option(help="JSON lines of requests with refusals; default: the package's own.")] = None,
    general: Annotated[Path | None, typer.Option(help="JSON lines to leave alone: {prompt} rows are answered by the model itself.")] = None,
    mode: Annotated[str, typer.Option(help="hard (constrained), soft (penalised) or none (plain LoRA).")] = "hard",
    basis: Annotated[str, typer.Option(help="What to stay out of: activation, contrastive or weight.")] = "activation",
    side: Annotated[str, typer.Option(help="in, out or both.")] = "in",
    k: Annotated[int | None, typer.Option(help="Protected directions per module (default 32).")] = None,
    energy: Annotated[float | None, typer.Option(help="Or as many as hold this share of the energy.")] = None,
    reg_lambda: Annotated[float, typer.Option(help="For --mode soft: weight of the penalty.")] = 1.0,
    subspace: Annotated[str, typer.Option(help='Subspace file, directory or Hub id, or "auto".')] = "auto",
    prior: Annotated[list[Path] | None, typer.Option(help="Directory of an earlier patch to stack on; may be repeated.")] = None,
    r: Annotated[int, typer.Option(help="LoRA rank.")] = 8,
    lora_alpha: Annotated[int, typer.Option(help="LoRA alpha.")] = 16,
    target_modules: TargetsOption = "all-linear",
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 1.0,
    max_steps: Annotated[int, typer.Option(help="Optimizer steps; overrides --epochs when positive.")] = -1,
    batch_size: Annotated[int, typer.Option(help="Rows per step.")] = 8,
    max_length: Annotated[int, typer.Option(help="Tokens kept of each row.")] = 128,
    evaluate_every: Annotated[int, typer.Option(help="Steps between two looks at the validation split.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of initialisation and data order.")] = 0,
    report_to: Annotated[str, typer.Option(help="As in TrainingArguments: none, tensorboard, wandb, ...")] = "none",
    eval_limit: Annotated[int | None, typer.Option(help="Prompts of each kind at most.")] = None,
) -> None:
    """Train a safety patch, stopped where validation is best; safety and drift measured before and after."""
    from peft_safety.data import read_jsonl
    from peft_safety.recipes.patch import PatchOptions, make_patch
    from peft_safety.recipes.train import TrainOptions
    from peft_safety.recipes.watch import Stopping

    given = locals()
    training = TrainOptions(lr=lr, epochs=epochs, max_steps=max_steps, batch_size=batch_size, max_length=max_length, seed=seed, report_to=report_to)
    same = ("mode", "basis", "side", "k", "energy", "reg_lambda", "subspace", "r", "lora_alpha")
    options = PatchOptions(
        **{name: given[name] for name in same},
        target_modules=_targets(target_modules),
        prior_patches=tuple(str(path) for path in prior or ()),
        stopping=Stopping(every=evaluate_every),
        training=training,
    )
    refusals, kept = (None if path is None else read_jsonl(path) for path in (data, general))
    make_patch(model, out, options, refusals=refusals, general=kept, eval_limit=eval_limit)


@app.command()
def verify(
    directory: Annotated[Path, typer.Argument(help="Adapter directory.")],
    model: Annotated[str | None, typer.Option("--model", "-m", help="Also compare the base weights with this model.")] = None,
    json: JsonOption = False,
) -> None:
    """Check that a directory holds a protected adapter, whole and unchanged. Exits with 1 if not."""
    from peft_safety.errors import PeftSafetyError
    from peft_safety.verification import verify as check

    base = None
    if model is not None:
        from peft_safety.recipes.load import load_model

        base, _ = load_model(model)
    try:
        found = check(directory, base)
    except PeftSafetyError as error:
        _fail(error, code=1)
    _show("Adapter: all checks passed", asdict(found), json)


@app.command()
def repair(
    adapter: Annotated[Path, typer.Argument(help="Directory of a trained LoRA adapter.")],
    unaligned: Annotated[str, typer.Option(help="Directory or Hub id of the model before its alignment.")],
    aligned: Annotated[str | None, typer.Option(help="Of the model after it; default: the adapter's base model.")] = None,
    out: Annotated[Path | None, typer.Option(help="Directory for the repaired adapter.")] = None,
    select: Annotated[str, typer.Option(help="Which modules: threshold, number or all.")] = "threshold",
    threshold: Annotated[float, typer.Option(help="Repair modules with a smaller cosine.")] = 0.35,
    num_modules: Annotated[int | None, typer.Option(help="For --select number: the modules with the smallest cosines.")] = None,
    projection: Annotated[str, typer.Option(help="frobenius (as published), spectral, topk or soft.")] = "frobenius",
    rank: Annotated[int | None, typer.Option(help="Directions of topk and soft.")] = None,
    energy: Annotated[float | None, typer.Option(help="Or the share of the alignment's energy they hold.")] = None,
    penalty: Annotated[float, typer.Option(help="For soft: weight of the part outside.")] = 4.0,
    zero_delta: Annotated[str, typer.Option(help="Modules that alignment left alone: error, keep or zero.")] = "error",
    allow_quantized_delta: Annotated[bool, typer.Option("--allow-quantized-delta", help="Take the alignment from 4-bit or 8-bit weights.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only report; --out is not written.")] = False,
    png: Annotated[Path | None, typer.Option(help="Draw the cosines here.")] = None,
    json: JsonOption = False,
) -> None:
    """Repair a trained LoRA adapter by Safe LoRA: no data, no training, no model in memory."""
    from peft_safety.errors import ConfigError
    from peft_safety.methods.safe_lora import safe_lora_dir
    from peft_safety.methods.safe_lora.config import OPTIONS
    from peft_safety.repair_report import save_png, table

    if out is None and not dry_run:
        raise ConfigError("repair writes nothing without --out. Give a directory, or --dry-run.")
    given = locals()
    found = safe_lora_dir(adapter, unaligned, aligned, None if dry_run else out, progress=not json, **{name: given[name] for name in OPTIONS})
    if png is not None:
        save_png(found, png)
    if json:
        typer.echo(jsonlib.dumps(found.to_json(), indent=1))
        return
    from rich.console import Console

    Console().print(table(found))
    typer.echo(f"nothing written: --dry-run{'' if png is None else f' (picture: {png})'}" if dry_run else f"repaired adapter written to {out}")


@app.command()
def audit(
    adapter: Annotated[Path, typer.Argument(help="Directory of a LoRA adapter, of this package or not.")],
    model: Annotated[str | None, typer.Option("--model", "-m", help="Hub id or directory of the base model; default: the one the adapter names.")] = None,
    calibration: Annotated[str, typer.Option(help="Inputs for the functional part: none, or auto for the package's own.")] = "none",
    general: Annotated[Path | None, typer.Option(help="Instead: JSON lines of harmless prompt/response rows; needs --harmful.")] = None,
    harmful: Annotated[Path | None, typer.Option(help="And of harmful requests with safe answers.")] = None,
    k: Annotated[int, typer.Option(help="Directions of each weight behind the energy overlap.")] = 32,
    positions: Annotated[str, typer.Option(help="Tokens that count: response, prompt or all.")] = "response",
    png: Annotated[Path | None, typer.Option(help="Draw layers by kinds of module here.")] = None,
    every: Annotated[bool, typer.Option("--all", help="One row a module instead of medians by kind of module.")] = False,
    json: JsonOption = False,
) -> None:
    """How an adapter's update lies in relation to the weights under it, beside chance; and what it does to general and harmful inputs."""
    from peft_safety.orthogonality import orthogonality_report
    from peft_safety.orthogonality.render import save_png, show
    from peft_safety.recipes.load import load_adapter

    data = _calibration(calibration, general, harmful)
    loaded, tokenizer = load_adapter(adapter, model)
    found = orthogonality_report(loaded, calibration=data, tokenizer=tokenizer, k=k, positions=positions)  # type: ignore[arg-type]  # it refuses others
    if png is not None:
        save_png(found, png)
    typer.echo(jsonlib.dumps(found.to_json(), indent=1, allow_nan=False)) if json else show(found, every)


@app.command()
def export(
    directory: Annotated[Path, typer.Argument(help="Directory of a protected adapter.")],
    out: Annotated[Path, typer.Option(help="Directory for the plain LoRA.")],
) -> None:
    """Write a protected adapter as plain LoRA that any PEFT loads and that computes the same function."""
    from peft_safety.export import export_directory

    typer.echo(f"plain LoRA written to {export_directory(directory, out)}")


@app.command()
def report(
    path: Annotated[Path, typer.Argument(help="A report.json that protect or the demo wrote.")],
    png: Annotated[Path | None, typer.Option(help="Also draw it here.")] = None,
    card: Annotated[bool, typer.Option("--card", help="Print a Markdown section for a model card instead of a table.")] = False,
) -> None:
    """Print a saved report as a table or a model-card section, or draw it."""
    from peft_safety.report import Report

    loaded = Report.load(path)
    if png is not None:
        loaded.save_png(png)
    typer.echo(loaded.card()) if card else loaded.print()


@app.command()
def info(json: JsonOption = False) -> None:
    """Versions, registered adapter types and devices."""
    import torch

    from peft_safety import registry
    from peft_safety.report import environment

    registry.register()
    facts = environment(seed=0)
    facts.pop("seed")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or ["cpu"]
    _show("peft-safety", {**facts, "adapter types": ", ".join(registry.config_types()), "devices": ", ".join(devices)}, json)


def main() -> None:
    """Entry point: typed errors become one line on stderr and exit code 2."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns on import of an optional CPU kernel that nothing here uses
    try:
        app()
    except Exception as error:
        from peft_safety.errors import PeftSafetyError

        if not isinstance(error, PeftSafetyError):
            raise
        _fail(error, code=2)


def _fail(error: Exception, code: int) -> Any:
    from rich.console import Console

    Console(stderr=True).print(f"[bold red]{type(error).__name__}[/]:", str(error), markup=True, highlight=False, soft_wrap=True)
    sys.exit(code)


def _targets(text: str) -> str | list[str]:
    """Names separated by commas become a list; everything else is a shorthand, a name or a regular expression."""
    if text == "all-linear" or any(c in text for c in "*+?()[]|\\^$"):
        return text
    return [name.strip() for name in text.split(",") if name.strip()]


def _numbers(pairs: list[str]) -> dict[str, float]:
    """`kind=number` options: whole numbers stay integers."""
    from peft_safety.errors import ConfigError

    found: dict[str, float] = {}
    for pair in pairs:
        kind, _, text = pair.partition("=")
        try:
            found[kind.strip()] = float(text) if "." in text else int(text)
        except ValueError as error:
            raise ConfigError(f"--per-kind {pair!r}. Write a kind of module and a number: down_proj=0.1.") from error
    return found


def _calibration(named: str, general: Path | None, harmful: Path | None) -> Any:
    """What `--calibration`, `--general` and `--harmful` ask for."""
    from peft_safety.data import read_jsonl
    from peft_safety.errors import ConfigError

    if named not in ("none", "auto"):
        raise ConfigError(f"--calibration {named!r}. Use none or auto, or give --general and --harmful.")
    if general is None and harmful is None:
        return None if named == "none" else "auto"
    if general is None or harmful is None or named == "auto":
        raise ConfigError("own calibration data are two files. Give both --general and --harmful, without --calibration auto.")
    return {"general": read_jsonl(general), "harmful": read_jsonl(harmful)}


def _show(title: str, facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(jsonlib.dumps(facts, indent=1, default=str))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, show_header=False, title_justify="left")
    for key, value in facts.items():
        shown = f"{value:.3g}" if isinstance(value, float) else ", ".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
        table.add_row(str(key).replace("_", " "), shown)
    Console().print(table)
