"""What each step of a job depends on: a step whose settings and data have not changed is not run again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

from peft_safety.core import files, subspace_file
from peft_safety.core.missing import not_found
from peft_safety.errors import ConfigError
from peft_safety.evaluation.versions import own_version
from peft_safety.recipes.job.job import Job

READING = (
    "dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split", "dataset_text_field", "held_out",
    "poison", "seed",
)  # fmt: skip
"""Settings that the rows depend on."""
LOADING = (
    "model_name_or_path", "model_revision", "dtype", "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type",
    "use_bnb_nested_quant", "model_init_kwargs", "chat_template_path", "eos_token",
)  # fmt: skip
"""Settings that the model depends on."""
CALIBRATING = (
    *LOADING, "lora_target_modules", "lora_target_parameters", "seed", "method", "subspace", "safety_rank",
    "safety_energy", "safety_rank_pattern", "basis", "positions", "combine", "combine_rank", "calibration_rows",
    "calibration_contexts",
)  # fmt: skip
"""Settings that a subspace depends on."""
MEASURING = ("eval_split", "eval_limit")
UNTRAINED = (*MEASURING, "skip", "dry_run", "output_dir", "disable_tqdm", "run_name")
PREFIXES = ("hub_", "logging_", "push_", "report_", "resume_", "save_")
"""Settings, and beginnings of others, that training does not depend on."""


def step_digests(job: Job) -> dict[str, str]:
    """What each step depends on, beside the steps before it."""
    settings, data, base, given = job.settings, job.data.digest(), _base(job), _subspace(job)
    training = [n for n in settings.given if n not in UNTRAINED and not n.startswith(PREFIXES)]
    checked = {"clean": files.sha256(Path(job.own.clean))} if job.own.clean is not None else {}
    of_rows = (*READING, "drop_flagged", "max_length") if job.own.calibration_contexts is not None else ()
    more = {"data": data, **checked} if of_rows else {}
    return {
        "screen": settings.digest((*LOADING, *READING, "screen_prompts"), data=data, **checked, **base),
        "calibrate": settings.digest((*CALIBRATING, *of_rows), **more, **base, **given),
        "train": settings.digest(training, data=data, **base, **given),
        "measure": settings.digest([*training, *MEASURING], data=data, **base, **given),
        "verify": settings.digest(()),
        "report": settings.digest(()),
    }


def _base(job: Job) -> dict[str, Any]:
    """What the name of the model stands for today: a commit of the hub, or the content of a directory (a second for
    each GB). And how its tokenizer writes turns.
    """
    name = job.settings.model.model_name_or_path
    asked = {"revision": job.settings.model.model_revision, **(job.training.model_init_kwargs or {})}
    folder = str(asked.get("subfolder", ""))
    if os.path.isdir(name):
        version: str | None = own_version(os.path.join(name, folder))[0]
    else:
        try:
            config = cached_file(name, "config.json", revision=asked["revision"], subfolder=folder)
            version = extract_commit_hash(config, None)
        except (OSError, ValueError) as error:
            raise ConfigError(not_found("model", name, error)) from error
    return {"model": version, "template": job.tokenizer.chat_template}


def _subspace(job: Job) -> dict[str, str]:
    """The same of a given subspace."""
    if not job.protected or job.own.subspace == "auto":
        return {}
    return {"subspace": files.sha256(subspace_file.locate(job.own.subspace))}
