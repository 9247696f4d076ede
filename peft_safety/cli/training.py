"""Commands that run a model: calibrate, train, patch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Context, Option, echo

from peft_safety.cli import options as opt
from peft_safety.cli.common import app, print_facts, show
from peft_safety.core.training import PATCH_TRAINING, TrainOptions
from peft_safety.errors import ConfigError

ANY_FLAG = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
"""The flags of `train` are TRL's fields: it reads them itself."""


@app.command()
def calibrate(
    model: opt.Model,
    out: Annotated[Path | None, Option(help="File (.safetensors) or directory for the subspace.")] = None,
    data: Annotated[
        Path | None, Option(help="JSON lines of prompt/response rows; default: the package's own.")
    ] = None,
    method: Annotated[
        str, Option(help="guardspace, ortho_patch (inputs), salora (outputs on refusals), or weight (no data).")
    ] = "guardspace",
    safety_rank: opt.SafetyRank = None,
    safety_energy: opt.SafetyEnergy = None,
    safety_rank_pattern: opt.SafetyRankPattern = None,
    basis: Annotated[str | None, Option(help="The package's own rows to use: harmful, general or both.")] = None,
    contexts: Annotated[
        int, Option(help="Read each row so many times more, behind random contexts: nonsense, a story, ... (5 kinds).")
    ] = 0,
    side: Annotated[str | None, Option(help="in, out or both; default: the method's own.")] = None,
    positions: Annotated[str | None, Option(help="Tokens that count: response, prompt or all.")] = None,
    task_data: Annotated[Path | None, Option(help="JSON lines of the task: is it in the null space?")] = None,
    png: Annotated[Path | None, Option(help="Draw the energy left outside, and the task's, by k here.")] = None,
    target_modules: opt.Targets = "all-linear",
    batch_size: Annotated[int, Option(help="Sequences per forward pass.")] = 8,
    max_length: opt.MaxLength = 512,
    seed: opt.Seed = 0,
    memory: Annotated[
        str | None, Option(help='Budget beside the model, such as "4GB"; default: half of what is free.')
    ] = None,
    dtype: Annotated[str, Option(help="Of the bases, in use and on disk: float16, bfloat16 or float32.")] = "float16",
    allow_fewer: Annotated[
        bool, Option("--allow-fewer", help="Where the data span fewer directions than --safety-rank, protect those.")
    ] = False,
    stream: Annotated[
        bool, Option("--stream", help="Leave the model on disk and read one layer at a time, for each batch.")
    ] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Only say what it will take: bytes, passes, seconds.")] = False,
    json: opt.Json = False,
) -> None:
    """Estimate a safety subspace and save it. For input sides, the energy that it covers is printed."""
    options = opt.parsed(locals(), "out", "task_data", "png", "dry_run", "json")
    from peft_safety.recipes import calibrate as recipe
    from peft_safety.reporting import coverage, style

    if dry_run:
        expected = recipe.calibration_cost(**options)
        show(expected.to_json(), json, lambda: coverage.show_cost(expected))
        return
    if out is None:
        raise ConfigError("calibrate writes nothing without --out. Give a file or directory, or --dry-run.")
    if png is not None:
        recipe.CalibrationOptions(**opt.split(options, recipe.CalibrationOptions)[0]).check_drawn()
        style.check_png(png)
    result = recipe.calibrate(**options, out=out, task_data=task_data)
    provenance = {name: value for name, value in result.subspace.provenance.items() if name != "covered"}
    facts = {"file": str(result.path), "modules": len(result.subspace.bases), **provenance}
    tables = [lambda: print_facts("Safety subspace", facts)]
    tables += [lambda: coverage.show(result.coverage)] if result.coverage else []
    show(facts | {"coverage": coverage.to_json(result.coverage)}, json, *tables)
    if png is not None:
        coverage.save_png(result.coverage, png)


@app.command(context_settings=ANY_FLAG, add_help_option=False)
def train(context: Context) -> None:
    """Fine-tune by TRL with safety measured before and after; settings from flags or --config FILE.yaml."""
    from peft_safety.recipes.job import settings

    if {"-h", "--help"} & {*context.args}:
        echo(settings.help_text())
        return
    chosen = settings.Settings.read(context.args)
    if chosen.own.dry_run:
        from peft_safety.recipes.job.plan import make_plan, show_plan

        show_plan(make_plan(chosen))
        return
    from peft_safety.recipes.job.run import run_job

    run_job(chosen)


@app.command()
def patch(
    model: opt.Model,
    out_dir: opt.ReportDir,
    data: Annotated[Path | None, Option(help="JSON lines of requests with refusals; default: the package's.")] = None,
    general: Annotated[
        Path | None, Option(help="JSON lines to leave alone: {prompt} rows are answered by the model itself.")
    ] = None,
    mode: Annotated[str, Option(help="hard (constrained), soft (penalized) or none (plain LoRA).")] = "hard",
    basis: Annotated[str, Option(help="What to stay out of: activation, contrastive or weight.")] = "activation",
    side: Annotated[str, Option(help="in, out or both.")] = "in",
    safety_rank: Annotated[
        float | None,
        Option(help="As for train; default 32 directions. 0 protects the directions of earlier patches only."),
    ] = None,
    safety_energy: opt.SafetyEnergy = None,
    safety_rank_pattern: opt.SafetyRankPattern = None,
    reg_lambda: Annotated[float | None, Option(help="For --mode soft: weight of the penalty (default 100).")] = None,
    subspace: Annotated[str, Option(help='Subspace file, directory or Hub id, or "auto".')] = "auto",
    prior: Annotated[list[Path] | None, Option(help="An earlier patch to stack on; may be repeated.")] = None,
    r: opt.Rank = 8,
    lora_alpha: opt.Alpha = 16,
    target_modules: opt.Targets = "all-linear",
    lr: opt.LearningRate = PATCH_TRAINING.lr,
    epochs: opt.Epochs = PATCH_TRAINING.epochs,
    max_steps: opt.MaxSteps = -1,
    batch_size: opt.BatchSize = PATCH_TRAINING.batch_size,
    max_length: opt.MaxLength = PATCH_TRAINING.max_length,
    evaluate_every: Annotated[int, Option(help="Steps between two looks at the validation split.")] = 50,
    seed: opt.Seed = 0,
    report_to: opt.ReportTo = "none",
    eval_limit: opt.EvalLimit = None,
) -> None:
    """Train a safety patch, stopped where validation is best; safety and drift measured before and after."""
    options = opt.parsed(locals(), "model", "out_dir", "data", "general", "prior", "evaluate_every", "eval_limit")
    from peft_safety.data import read_jsonl
    from peft_safety.recipes.patch import PatchOptions, make_patch
    from peft_safety.recipes.watch import Stopping

    training, rest = opt.split(options, TrainOptions)
    rest |= {"prior_patches": tuple(map(str, prior or ())), "stopping": Stopping(every=evaluate_every)}
    chosen = PatchOptions(**rest, training=TrainOptions(**training))
    refusals, kept = (None if path is None else read_jsonl(path) for path in (data, general))
    make_patch(model, out_dir, chosen, refusals=refusals, general=kept, eval_limit=eval_limit)
