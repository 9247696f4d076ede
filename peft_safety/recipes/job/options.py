"""The options of a job that are this package's own, beside TRL's. Imports neither torch nor TRL."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft_safety.core.training import HOLDOUT, LEARNING_RATE

OUR_DEFAULTS: dict[str, Any] = {
    "learning_rate": LEARNING_RATE,  # TRL's is for all of a model's weights
    "lora_alpha": 16,  # the learning rate was chosen with it
    "lora_dropout": 0.0,  # with dropout, inputs leave the protected span while training
    "lora_target_modules": ["all-linear"],
}
"""Defaults other than TRL's."""
WITHOUT_ACCELERATOR = {"bf16": "off", "use_cpu": "on"}
"""Further ones where there is none: bf16 is slow on CPUs, and several processes find each other by `use_cpu` only."""
OTHER_NAMES = {
    "model": "model_name_or_path",
    "data": "dataset_name",
    "out": "output_dir",
    "lr": "learning_rate",
    "rank": "lora_r",
    "target_modules": "lora_target_modules",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
}
"""Names in the other commands -> TRL's."""
STEPS = ("screen", "calibrate", "train", "measure", "verify", "report")
"""In their order."""


def option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class SafetyOptions:
    """Which adapter, what is measured, and which steps run; the fields' help says what each is."""

    method: str = option("guardspace", "guardspace, salora or lora (no protection).")
    subspace: str = option("auto", "Subspace file, directory or Hub id; auto calibrates on the package's prompts.")
    safety_rank: float | None = option(
        None, "Protected directions per layer, or below 1 a share of its features; 0.25 for guardspace, else 32."
    )
    safety_energy: float | None = option(
        None, "As many directions as hold this share of the energy; at most safety_rank, if that is given."
    )
    safety_rank_pattern: list[str] | None = option(
        None, "Another safety_energy, if given, else safety_rank, for a kind of module: down_proj=0.1."
    )
    basis: str | None = option(None, "For guardspace: harmful (default), general or both.")
    positions: str | None = option(None, "For guardspace, tokens that count: all (default), prompt or response.")
    screen_prompts: int | None = option(
        None, "So many of each file of the package's prompts for the screen to learn from; default 256."
    )
    clean: str | None = option(
        None,
        "JSON lines of the task that somebody has checked: they set the screen's threshold, and what they begin or "
        "end with is none of the contexts of calibration_contexts=all.",
    )
    calibration_rows: int | None = option(None, "So many of the package's prompts to calibrate on; default all.")
    calibration_contexts: str | None = option(
        None, "Calibrate under the training data's own system prompts, too: system; all: and behind what rows share."
    )
    train: str | None = option(
        None, "For guardspace: B (A frozen: a plain LoRA; default), A (both, projected) or window."
    )
    window: int | None = option(None, "For train=window: directions of each layer; 64 by default.")
    a_init: str | None = option(None, "For train=B and window: task (default) or random directions.")
    init: str | None = option(None, "lora (B = 0, default), or task for salora, guardspace for guardspace.")
    combine: str | None = option(None, "For guardspace: salora protects SaLoRA's outputs too.")
    combine_rank: int | None = option(None, "For combine: directions of each layer; 32 by default.")
    held_out: float = option(HOLDOUT, "Share of the rows to measure on, where the data have no splits; 0 for none.")
    eval_split: str = option("test", "Of the package's prompts: test, or validation while choosing settings.")
    eval_limit: int | None = option(None, "Prompts and held-out rows of each kind to measure on, at most.")
    poison: float = option(0.0, "Share of the rows replaced by a simulated attack, for demonstrations (0 to 1).")
    drop_flagged: bool = option(False, "Leave out the rows whose requests the model refuses while the row complies.")
    skip: list[str] | None = option(None, f"Steps to leave out: {', '.join(STEPS)}.")
    dry_run: bool = option(False, "Only print the plan: tokens, steps, memory, what is protected.")
