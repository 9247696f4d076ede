"""A job from its first step to its last: what is done is not done again."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback

from peft_safety.core import files
from peft_safety.recipes.job.digests import step_digests
from peft_safety.recipes.job.job import Job
from peft_safety.recipes.job.options import STEPS
from peft_safety.recipes.job.settings import Settings
from peft_safety.recipes.job.steps import RUN, say
from peft_safety.reporting.report import Report
from peft_safety.screening.states import by_first, process


@dataclass(frozen=True)
class JobResult:
    """The adapter's directory, the facts of each finished step, and the report if safety was measured."""

    adapter_dir: Path
    facts: dict[str, dict[str, Any]]
    report: Report | None


def run_job(settings: Settings, callbacks: Sequence[TrainerCallback] = ()) -> JobResult:
    """Run the steps of a job that are neither skipped nor done. Writes `adapter/`, `subspace.safetensors`,
    `report.json`, `report.png` and `job.json`, the state, into the output directory, and prints the report.

    Args:
        callbacks: further callbacks of the trainer.

    Raises:
        ConfigError, DataError, and an ArtifactError where the output directory cannot be written: before a model is
            loaded. CalibrationError, ProtectionError, ArtifactError: by a step.
    """
    job = Job(settings, callbacks)
    rows, held_out = len(job.data.train), len(job.data.held_out or ())
    split = f"{rows} rows to train on, {held_out} held out ({held_out / (rows + held_out):.0%})"
    world = process()[1]
    say(job, f"{split}, {world} process{'es' if world > 1 else ''}")
    if job.note:
        say(job, job.note)
    digests, done = _agreed(job)
    for number, step in enumerate(STEPS, 1):
        begins = f"[{number}/{len(STEPS)}] {step}"
        if step in (settings.own.skip or ()) or step in done:
            say(job, f"{begins}: {'done before' if step in done else 'skipped'}")
        else:
            say(job, begins)
            started = time.perf_counter()
            job.state.start(step, digests[step])
            facts = RUN[step](job)
            if facts is not None:
                facts["seconds"] = round(time.perf_counter() - started, 2)
                job.state.finish(step, facts)
        if step == "screen" and settings.own.drop_flagged:
            job.leave_out(job.state.facts(step)["suspicious"])
    if job.adapter_dir.is_dir():
        say(job, f"adapter: {job.adapter_dir}")
    saved = job.state.facts("report")
    loaded = Report.load(job.out / "report.json") if saved and job.main else None
    return JobResult(job.adapter_dir, {step: job.state.facts(step) for step in job.state.steps}, loaded)


def _agreed(job: Job) -> tuple[dict[str, str], set[str]]:
    """What the steps depend on, and those that are done, as the first process finds it: all processes have to run the
    same steps, and another one may have other files under the same names.
    """

    def found() -> tuple[dict[str, str], set[str]]:
        files.check_place(job.state.path)
        digests = step_digests(job)
        return digests, _finished(job, digests)

    agreed = by_first(found)
    PartialState().wait_for_everyone()  # all know it before one process changes the state
    return agreed


def _finished(job: Job, digests: dict[str, str]) -> set[str]:
    """Steps that are done with these settings, and whose results are there, up to the first one that has to run."""
    done: set[str] = set()
    for step in STEPS:
        if job.state.is_done(step, digests[step]) and _outputs(job, step):
            done.add(step)
        elif step not in (job.own.skip or ()):
            break
    return done


def _outputs(job: Job, step: str) -> bool:
    """Whether the files are there that a finished step has written, or the screening that `drop_flagged` needs."""
    if step == "screen":
        return not (job.own.drop_flagged and "problem" in job.state.facts(step))
    wanted = {"calibrate": job.subspace if job.own.subspace == "auto" else None, "train": str(job.adapter_dir)}
    path = wanted.get(step) if step != "report" else str(job.out / "report.json")
    return path is None or Path(path).exists()
