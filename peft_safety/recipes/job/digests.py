"""What each step of a job depends on: a step whose settings and data have not changed is not run again."""

from __future__ import annotations

from peft_safety.recipes.job.job import Job

READING = (
    "dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split", "dataset_text_field", "held_out",
    "poison", "seed",
)  # fmt: skip
"""Settings that the rows depend on."""
LOADING = (
    "model_name_or_path", "model_revision", "dtype", "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type",
    "use_bnb_nested_quant", "chat_template_path",
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
    settings, data = job.settings, job.data.digest()
    training = [n for n in settings.given if n not in UNTRAINED and not n.startswith(PREFIXES)]
    of_rows = (*READING, "drop_flagged", "max_length") if job.own.calibration_contexts is not None else ()
    more = {"data": data} if of_rows else {}
    return {
        "screen": settings.digest((*LOADING, *READING, "screen_prompts"), data=data),
        "calibrate": settings.digest((*CALIBRATING, *of_rows), **more),
        "train": settings.digest(training, data=data),
        "measure": settings.digest([*training, *MEASURING], data=data),
        "verify": settings.digest(()),
        "report": settings.digest(()),
    }
