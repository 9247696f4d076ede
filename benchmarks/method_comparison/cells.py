"""One cell: a method trains, and is measured."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, TaskType, get_peft_model
from transformers import set_seed

from benchmarks.common import publish, reset_peak, resident_mib, resident_now_mib
from benchmarks.method_comparison import task
from benchmarks.method_comparison.arms import ARMS, TARGETS, Base
from peft_safety.evaluation import prompt_set, self_responses
from peft_safety.evaluation.tasks import response_nll
from peft_safety.recipes.load import load_model
from peft_safety.recipes.train import TrainOptions, finetune

GENERAL_TOKENS = 24
"""Tokens of the model's own answers to general prompts."""


@dataclass(frozen=True)
class Settings:
    """How every arm trains, and how much it is measured on. A change makes new cells."""

    r: int = 32
    lr: float = 2e-3
    steps: int = 16
    batch_size: int = 8
    test: int = 60
    general: int = 16
    max_length: int = 64
    seed: int = 0


class Cells:
    """Finished cells, one file each; what they share is made when the first cell needs it."""

    def __init__(self, folder: Path, model: str, settings: Settings) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.model, self.settings = folder, model, settings
        self._general: list[dict[str, Any]] = []
        self._before: dict[str, Any] = {}

    def path(self, arm: str) -> Path:
        return self.folder / f"{_key([arm, self.model, asdict(self.settings)])}.json"

    def get(self, arm: str) -> dict[str, Any] | None:
        """The result of a finished cell, or None."""
        path = self.path(arm)
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def run(self, arm: str) -> dict[str, Any]:
        """Train and measure one arm; the result is kept."""
        given, chosen = self.settings, ARMS[arm]
        model, tokenizer = load_model(self.model)
        test = task.rows("test", given.test, given.seed)
        if not self._general:
            prompts = prompt_set("test", given.general, given.seed).general
            self._general = self_responses(model, tokenizer, prompts, max_new_tokens=GENERAL_TOKENS, progress=False)
            self._before = {
                "accuracy_before": task.accuracy(model, tokenizer, test).to_json(),
                "general_before": response_nll(model, tokenizer, self._general, progress=False).value,
            }
            once = LoraConfig(r=1, target_modules=list(TARGETS), task_type=TaskType.CAUSAL_LM)
            step = TrainOptions(max_steps=1, batch_size=1, progress=False)
            model = finetune(model, tokenizer, task.tokens(tokenizer, test[:1]), once, step)[
                0
            ].unload()  # what is loaded at a first step
        subspace = self.folder / f"subspace-{_key(self.model)}"
        base = Base(model, tokenizer, given.r, task.tokens(tokenizer, task.rows("train", None, given.seed)), subspace)
        set_seed(given.seed)
        reset_peak()
        held, started, clock = resident_now_mib(), time.perf_counter(), [time.process_time()]
        config = chosen.config(base)
        clock.append(time.process_time())
        tuned = get_peft_model(model, config)
        for name, parameter in tuned.named_parameters() if chosen.freeze_a else ():
            parameter.requires_grad_("lora_B" in name)
        clock.append(time.process_time())
        lr = given.lr * chosen.lr
        sizes = {"max_steps": given.steps, "batch_size": given.batch_size, "max_length": given.max_length}
        how = TrainOptions(lr=lr, seed=given.seed, progress=False, **sizes)
        reset_peak()
        tuned, run = finetune(tuned, tokenizer, base.rows, None, how)
        row: dict[str, Any] = {
            "arm": arm,
            "lr": lr,
            "trainable": run.trainable_parameters,
            "steps": run.steps,
            "loss": run.last_loss,
            "calibration_cpu_seconds": round(clock[1] - clock[0], 2),
            "setup_cpu_seconds": round(clock[2] - clock[1], 2),
            "step_cpu_seconds": round((time.process_time() - clock[2]) / run.steps, 3),
            "seconds": round(time.perf_counter() - started, 1),
            "added_mib": round(resident_mib() - held),
        }
        row["file_mib"] = file_mib(tuned)
        row["accuracy"] = task.accuracy(tuned, tokenizer, test).to_json()
        row |= self._before | {"general_after": response_nll(tuned, tokenizer, self._general, progress=False).value}
        publish(self.path(arm), json.dumps(row))
        return row


def _key(what: Any) -> str:
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


def file_mib(model: Any) -> float:
    """What `save_pretrained` writes as safetensors, in MiB."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return round(sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors")) / 2**20, 4)
