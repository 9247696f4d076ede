"""One cell: a method trains, and is measured."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peft import get_peft_model
from transformers import set_seed

from benchmarks.common import kept_result, publish, reset_peak, resident_mib, resident_now_mib
from benchmarks.method_comparison import task
from benchmarks.method_comparison.arms import ARMS, Base, lora
from peft_safety.evaluation import prompt_set, self_responses
from peft_safety.evaluation.tasks import response_nll
from peft_safety.recipes.load import load_model
from peft_safety.recipes.train import TrainOptions, finetune


@dataclass(frozen=True)
class Settings:
    """How every arm trains, and how much it is measured on. A change makes new cells."""

    r: int = 32
    lr: float = 3e-3
    steps: int = 24
    batch_size: int = 8
    test: int = 60
    general: int = 16
    seed: int = 0


class Cells:
    """Finished cells, one file each, and what is measured before the first of them."""

    def __init__(self, folder: Path, model: str, settings: Settings) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.model, self.settings = folder, model, settings
        self.general: list[dict[str, Any]] = []
        self.before: dict[str, Any] = {}

    def path(self, *key: Any) -> Path:
        """Where something that depends on the model and on `key` is."""
        digest = hashlib.sha256(json.dumps([self.model, *key]).encode()).hexdigest()
        return self.folder / f"{digest[:16]}.json"

    def cell(self, arm: str) -> Path:
        return self.path(arm, asdict(self.settings))

    def get(self, arm: str) -> dict[str, Any] | None:
        """The result of a finished cell, or None."""
        return kept_result(self.cell(arm))

    def prepare(self, model: Any, tokenizer: Any, test: list[dict[str, str]]) -> None:
        """Measure the model before training; and one step, so that no arm pays for what the first one loads."""
        given = self.settings
        prompts = prompt_set("test", given.general, given.seed).general
        self.general = self_responses(model, tokenizer, prompts, max_new_tokens=24, progress=False)
        right, loss = (
            task.accuracy(model, tokenizer, test),
            response_nll(model, tokenizer, self.general, progress=False),
        )
        step = TrainOptions(max_steps=1, batch_size=1, progress=False)
        finetune(model, tokenizer, task.tokens(tokenizer, test[:1]), lora(1), step)[0].unload()
        self.before = {"accuracy_before": right.to_json(), "general_before": loss.value}

    def run(self, arm: str) -> dict[str, Any]:
        """Train and measure one arm; the result is kept."""
        given, chosen = self.settings, ARMS[arm]
        test = task.rows("test", given.test, given.seed)
        if not self.before:
            self.prepare(*load_model(self.model), test)
        model, tokenizer = load_model(self.model)
        rows = task.tokens(tokenizer, task.rows("train", None, given.seed))
        base = Base(model, tokenizer, given.r, rows, self.path("subspace").with_suffix(""))
        set_seed(given.seed)
        reset_peak()
        held, clock = resident_now_mib(), [time.process_time()]
        config = chosen.config(base)
        clock.append(time.process_time())
        tuned = get_peft_model(model, config)
        for name, parameter in tuned.named_parameters() if chosen.freeze_a else ():
            parameter.requires_grad_("lora_B" in name)
        clock.append(time.process_time())
        lr, sizes = given.lr * chosen.lr, {"max_steps": given.steps, "batch_size": given.batch_size}
        reset_peak()
        _, run = finetune(tuned, tokenizer, rows, None, TrainOptions(lr=lr, seed=given.seed, progress=False, **sizes))
        row: dict[str, Any] = {
            "arm": arm,
            "lr": lr,
            "trainable": run.trainable_parameters,
            "steps": run.steps,
            "loss": run.last_loss,
            "calibration_cpu_seconds": round(clock[1] - clock[0], 2),
            "setup_cpu_seconds": round(clock[2] - clock[1], 2),
            "step_cpu_seconds": round((time.process_time() - clock[2]) / run.steps, 3),
            "added_mib": round(resident_mib() - held),
            "file_mib": file_mib(tuned),
            "accuracy": task.accuracy(tuned, tokenizer, test).to_json(),
            "general_after": response_nll(tuned, tokenizer, self.general, progress=False).value,
            **self.before,
        }
        publish(self.cell(arm), json.dumps(row))
        return row


def file_mib(model: Any) -> float:
    """What `save_pretrained` writes as safetensors, in MiB."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors")) / 2**20
