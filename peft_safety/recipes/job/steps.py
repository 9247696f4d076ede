"""The steps of a job: screen, calibrate, train, measure, verify, report."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from peft_safety.calibration.prepare import MAX_LENGTH
from peft_safety.callbacks import SafetyMonitorCallback
from peft_safety.convert.verify import verify as check
from peft_safety.core import files
from peft_safety.core.environment import environment
from peft_safety.core.subspace import SafetySubspace
from peft_safety.core.training import TrainOptions
from peft_safety.data import calibration_rows
from peft_safety.data.rows import Row
from peft_safety.errors import CalibrationError, ConfigError, DataError, PeftSafetyError, extra
from peft_safety.evaluation.judges import KeywordJudge
from peft_safety.evaluation.metrics import figure_from_json
from peft_safety.evaluation.tasks import WHOLE
from peft_safety.layers.frozen_linear import FrozenLinear
from peft_safety.methods.base import calibrate as estimate_for
from peft_safety.recipes.adapter import TASK_ROWS, with_task
from peft_safety.recipes.bench import Bench
from peft_safety.recipes.job.contexts import contexts_for, system_prompts
from peft_safety.recipes.job.data import has_turns
from peft_safety.recipes.job.hub import forget, reaching_hub, stale_names
from peft_safety.recipes.job.job import Job
from peft_safety.recipes.screen import screen as screen_rows
from peft_safety.recipes.train import TrainingRun
from peft_safety.reporting.report import Report
from peft_safety.screening.result import UNDECIDED

with extra("trl", "a job needs TRL"):
    from trl import SFTTrainer


def say(job: Job, text: str) -> None:
    if job.main:
        print(text, flush=True)


def screen(job: Job) -> dict[str, Any]:
    """The aligned model's view of the rows: a warning, and what `drop_flagged` leaves out."""
    if not has_turns(job.data.train):
        what = "plain text and tokens have no user turns. Text that a chat template has written is not read back"
        warnings.warn(f"rows not screened: {what}. Give turns, {{messages}}, to screen them.", stacklevel=2)
        return {"flagged": [], "suspicious": []}
    try:
        options: dict[str, Any] = {"tokenizer": job.tokenizer, "progress": job.progress}
        if job.own.screen_prompts is not None:
            options["known"] = job.own.screen_prompts
        if job.clean:
            options |= {"clean": job.clean, "labels": job.data.labels or None}  # checked rows may lack a label
        result = screen_rows(job.model, job.data.train, **options)
    except CalibrationError as error:
        if job.own.drop_flagged:
            raise
        warnings.warn(f"rows not screened: {error}", stacklevel=2)
        return {"flagged": [], "suspicious": [], "problem": str(error)}
    flagged, dropped = [row.number for row in result.flagged], result.dropped
    unscreened, truncated = len(result.unscreened), sum(row.truncated for row in result.rows)
    say(job, f"  {len(flagged)} of {len(result.rows)} rows look harmful; the model refuses {len(dropped)} that comply")
    if unscreened or truncated:
        say(job, f"  not screened, without a user turn: {unscreened}; screened without their beginning: {truncated}")
    if dropped and not job.own.drop_flagged:
        what = f"rows {dropped[:10]} comply where the model refuses"
        warnings.warn(f"{what}. Look at them, or set drop_flagged.", stacklevel=2)
    undecided = sum(row.verdict == UNDECIDED for row in result.flagged)
    if undecided:
        what = (
            f"{undecided} flagged rows are kept without a verdict: an answer could not be read, or is reasoning alone"
        )
        warnings.warn(f"{what}. Look at them, or screen first: peft-safety screen --no-verdict --drop.", stacklevel=2)
    counts = {"unscreened": unscreened, "truncated": truncated, "undecided": undecided, "auc": result.screen.auc}
    return {"flagged": flagged, "suspicious": dropped, **counts}


def calibrate(job: Job) -> dict[str, Any]:
    """The first process estimates the subspace; all read its file."""
    if not job.protected or job.own.subspace != "auto":
        return {"subspace": job.subspace}
    options = {"tokenizer": job.tokenizer, "seed": job.training.seed, "progress": job.progress}
    if job.own.calibration_contexts is not None:  # a long system prompt is read as training reads it
        options["max_length"] = max(MAX_LENGTH, job.training.max_length or WHOLE)
    if job.main:
        config: Any = job.config
        subspace = estimate_for(job.model, config, _calibration_rows(job, config), **options)
        subspace.save(str(job.subspace))
    PartialState().wait_for_everyone()
    provenance = SafetySubspace.load(str(job.subspace)).provenance
    plain = {name: value for name, value in provenance.items() if isinstance(value, (str, int, float))}
    return {"subspace": Path(str(job.subspace)).name, **plain}


def _calibration_rows(job: Job, config: Any) -> list[Row] | None:
    """Some of the package's prompts, or all, and if asked for the same in the contexts of the training rows; None for
    the config's own.
    """
    most, kind, data = job.own.calibration_rows, job.own.calibration_contexts, job.data.train
    if kind is None and (count := system_prompts(data)):
        say(job, f"  rows under a system prompt: {count}. Protect requests under theirs, too:")
        say(job, "  calibration_contexts: system")
    if most is None and kind is None:
        return None
    rows = calibration_rows(config.calibration["method"], config.calibration["basis"])
    if most is not None:
        rows = rows[:: max(1, len(rows) // most)][:most]
    further = contexts_for(rows, data, kind, job.training.seed, job.tokenizer, job.clean) if kind else []
    if kind and not further:
        say(job, "  no contexts in the training rows")
    return [*rows, *further]


def train(job: Job) -> dict[str, Any]:
    """TRL's SFTTrainer, with the protection checked at the start, at every save and at the end."""
    config: Any = job.config
    if job.protected:
        config.subspace = job.subspace
        options = {"tokenizer": job.tokenizer, "seed": job.training.seed, "progress": job.progress}
        config = with_task(config, job.model, job.batches(TASK_ROWS), **options)
    arguments = copy.copy(job.training)
    arguments.model_init_kwargs = None  # they are in the model
    monitor = [SafetyMonitorCallback()] if job.protected else []
    try:
        with reaching_hub(job, "Log in (hf auth login), or leave push_to_hub out."):
            trainer = SFTTrainer(
                model=job.model,
                args=arguments,
                train_dataset=job.data.train,
                eval_dataset=job.data.held_out if job.training.eval_strategy != "no" else None,
                processing_class=job.tokenizer,
                peft_config=config,
                callbacks=[*job.callbacks],
            )
            rows = _trained_rows(job, trainer)
            if job.main:
                forget(job, trainer)
    except PeftSafetyError:
        raise
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"TRL refuses these settings: {error}") from error
    trainer.callback_handler.callbacks[1:1] = monitor  # before those of report_to, which log what they are given
    job.sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    trainable = {name: parameter for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    for name, parameter in trainable.items():  # TRL casts the factors on a quantized base to bf16, which leaks (1e-3)
        if "lora_" in name and parameter.dtype == torch.bfloat16:
            parameter.data = parameter.data.float()
    for layer in trainer.model.modules() if is_deepspeed_zero3_enabled() else ():
        if isinstance(layer, FrozenLinear):
            layer.whole = layer.weight.detach().to("cpu", copy=True)
    trained = sum(parameter.numel() for parameter in trainable.values())
    result = trainer.train(resume_from_checkpoint=_checkpoint(job))
    if trainer.is_fsdp_enabled:  # checkpoints may be in shards, the adapter may not
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    with reaching_hub(job, "The same command with resume_from_checkpoint goes on from the last checkpoint."):
        trainer.save_model(str(job.adapter_dir))  # and pushes it, if that was asked for
    for name in stale_names(job) if job.main else ():
        files.drop(job.adapter_dir / name)
    job.tuned = trainer.accelerator.unwrap_model(trainer.model)
    run = asdict(TrainingRun.of(trainer, result, rows, trained))
    return {"train_seconds": run.pop("seconds"), **run}


def _trained_rows(job: Job, trainer: Any) -> int:
    """How many rows are trained on: TRL leaves out those without a label within `max_length`, unless it packs."""
    given = len(job.data.train)
    left = given if job.training.packing else len(trainer.train_dataset)
    within = f"within max_length={job.training.max_length}. Raise it, or shorten the rows"
    if not left:
        raise DataError(f"none of the {given} rows has a token to train on {within}.")
    if left < given:
        warnings.warn(f"TRL leaves out {given - left} of {given} rows: no token to train on {within}.", stacklevel=3)
    return left


def measure(job: Job) -> dict[str, Any] | None:
    """Safety, task and drift of the model without and with its adapter, on the same prompts; in the first process."""
    if job.sharded:
        say(job, "  a sharded model is not measured. Run the same command in one process, which only measures.")
        return None
    if not job.main:
        return {}
    model = job.adapted()
    options = TrainOptions(seed=job.training.seed, max_length=job.training.max_length or 512, progress=job.progress)
    with model.disable_adapter():
        where: dict[str, Any] = {"split": job.own.eval_split, "limit": job.own.eval_limit}
        bench = Bench.prepare(model, job.tokenizer, job.task, options, **where)
        before = bench.measure(model, job.tokenizer)
    after = bench.measure(model, job.tokenizer)
    arms = {"before": before, f"after ({job.own.method})": after}
    return {
        "before": before.to_json(),
        "after": after.to_json(),
        "arms": {arm: {name: f.to_json() for name, f in e.figures().items()} for arm, e in arms.items()},
    }


def verify(job: Job) -> dict[str, Any]:
    """Whether what was saved is a protected adapter, whole, and blind to the subspace."""
    if not job.main:
        return {}
    if not job.protected:
        return {"method": "lora", "protected": False}
    base = job.model if "model" in vars(job) and not job.sharded else None
    facts = asdict(check(job.adapter_dir, base, job.subspace))
    return {name: value for name, value in facts.items() if name not in ("directory", "provenance", "settings")}


def report(job: Job) -> dict[str, Any] | None:
    """`report.json`, `report.png` and a table."""
    measured = job.state.facts("measure")
    if not measured or not job.main:
        say(job, "  nothing was measured, so there is nothing to report")
        return None
    own, training = job.own, job.training
    attack = f"{100 * own.poison:g} % of the training rows were a simulated attack." if own.poison else "No poison."
    settings = {name: getattr(part, name) for part in job.settings.parts for name in vars(part)}
    shown = _plain({name: settings[name] for name in job.settings.given})
    made = Report(
        title=f"Fine-tuning by {own.method}: before and after",
        arms={arm: {name: figure_from_json(f) for name, f in row.items()} for arm, row in measured["arms"].items()},
        notes=(
            f"Judge: {measured['before']['judge']}. {KeywordJudge.caveat}",
            f"Prompts: the package's {own.eval_split} split. {attack} One seed ({training.seed}).",
        ),
        environment=environment(
            training.seed, model=job.settings.model.model_name_or_path, device=str(training.device)
        ),
        details={
            "settings": {"method": own.method, **shown},
            **{name: measured[name] for name in ("before", "after")},
            **{step: job.state.facts(step) for step in ("screen", "calibrate", "train", "verify")},
        },
    )
    made.write(job.out)
    made.print()
    say(job, f"written to {job.out}")
    return {"report": "report.json"}


RUN: dict[str, Callable[[Job], dict[str, Any] | None]] = {
    "screen": screen,
    "calibrate": calibrate,
    "train": train,
    "measure": measure,
    "verify": verify,
    "report": report,
}


def _checkpoint(job: Job) -> str | None:
    """The checkpoint to resume from, as given; with "true" the last one since training began with these settings.
    `trainer_state.json` is the last file of one.
    """
    given, began = job.training.resume_from_checkpoint, job.state.steps["train"]["began"]
    if str(given).lower() not in ("true", "yes"):
        return None if given is None or str(given).lower() in ("false", "no") else str(given)
    saved = job.out.glob("checkpoint-*/trainer_state.json")
    numbered = [path for path in saved if re.fullmatch(r"checkpoint-[0-9]+", path.parent.name)]
    fitting = [path.parent for path in numbered if path.stat().st_mtime >= began]
    last = max(fitting, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
    none = "none of the checkpoints is of these settings" if numbered else "no checkpoint yet"
    say(job, f"  resuming from {last}" if last else f"  {none}: training starts at its beginning")
    return None if last is None else str(last)


def _plain(value: Any) -> Any:
    """A value of JSON, without the tokens that give access (`hub_token`, `model_init_kwargs: {token: ...}`)."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items() if not str(name).endswith("token")}
    return value if isinstance(value, (str, int, float, list, type(None))) else str(value)
