"""What does an ordinary fine-tune do to a small model's safety, and what does SaLoRA change about that? On two CPU cores, in minutes.

    python -m examples.demo [--smoke] [--out runs/demo]

1. SmolLM2-135M-Instruct refuses little by itself, so a refusal patch is trained first (plain LoRA on refusals) and merged: the *aligned* model.
2. The aligned model is fine-tuned on a benign task (sorting help-desk messages), once by plain LoRA and once by SaLoRA, with the same rows, seed and
   settings; then again with one row in ten replaced by a simulated attack. A random subspace of the same rank is the control.
3. Every model is measured on prompts that nothing above has seen. Writes report.json and report.png.
"""

from __future__ import annotations

import argparse
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from peft_safety.evaluation import Evaluation
    from peft_safety.recipes.adapter import AdapterOptions
    from peft_safety.recipes.bench import Bench
    from peft_safety.recipes.train import TrainOptions
    from peft_safety.report import Report

SAFETY_RANK = 32
TARGETS = "all-linear"
LORA_RANK = 16


@dataclass(frozen=True)
class Scale:
    """How much of everything: rows to train on, and prompts of each kind to measure on."""

    harmful: int
    general: int
    contrast: int
    task_rows: int
    eval_limit: int
    poisons: tuple[float, ...]


FULL = Scale(harmful=200, general=30, contrast=140, task_rows=160, eval_limit=72, poisons=(0.0, 0.1))
SMOKE = Scale(harmful=64, general=8, contrast=24, task_rows=64, eval_limit=16, poisons=(0.0,))


class Demo:
    """The arms, the time each phase took, and what they share: one model, one bench, one seed."""

    def __init__(self, scale: Scale, split: str, safety_rank: int, seed: int, progress: bool = True) -> None:
        from peft_safety.recipes.train import TrainOptions

        self.scale, self.split, self.safety_rank = scale, split, safety_rank
        self.options = TrainOptions(lr=1e-3, max_length=128, seed=seed, progress=progress)
        self.evaluations: dict[str, Evaluation] = {}
        self.training: dict[str, dict[str, Any]] = {}
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase, and say when it begins and ends."""
        print(f"-> {name}", flush=True)
        started = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - started, 1)
        print(f"   {name}: {self.seconds[name]:.0f} s", flush=True)
