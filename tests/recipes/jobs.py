"""A tiny model and a file of rows on disk, and the settings of a job on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.tiny import tiny_llama, tiny_tokenizer

TASK = [{"text": f"message {index}", "label": "ab"[index % 2]} for index in range(20)]
PAIRS = [{"prompt": f"say {index}", "response": f"it is {index}"} for index in range(20)]
QUICK: dict[str, Any] = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "lora_r": 4,
    "logging_steps": 1,
    "eval_limit": 2,
    "max_length": 256,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


def stored_model(folder: Path, hidden: int = 32) -> str:
    for part in (tiny_llama(hidden=hidden), tiny_tokenizer()):
        part.save_pretrained(folder / "model")
    return str(folder / "model")


def job_on(
    folder: Path, rows: list[dict[str, Any]] = TASK, hidden: int = 32, screened: bool = False, **more: Any
) -> dict[str, Any]:
    """Settings by name; the model and the rows are written into the folder. No screening: it reads 800 prompts."""
    places = {
        "model_name_or_path": stored_model(folder, hidden),
        "dataset_name": write_rows(folder / "task.jsonl", rows),
        "output_dir": str(folder / "run"),
    }
    skip = [*more.pop("skip", []), *([] if screened else ["screen"])]
    return {**places, **QUICK, **({"skip": skip} if skip else {}), **more}


def losses(run_directory: Path, step: int) -> list[float]:
    """The logged losses up to a checkpoint."""
    history = json.loads((run_directory / f"checkpoint-{step}" / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]
