"""One row in ten of the training data is poisoned: what is left of the model's safety, with plain LoRA and with
GuardSpace? Minutes on two CPU cores.

    python -m examples.demo [--full] [--no-poison] [--smoke] [--out runs/demo]

1. SmolLM2-135M-Instruct refuses little by itself, so a safety patch that ships with the examples is attached first
   (`examples.safety_patch`).
2. This *aligned* model is fine-tuned on a benign task (sorting help-desk messages). One row in ten is a simulated
   attack: a harmful request, answered with a contentless opening ("Sure, here is"). Once by plain LoRA, once by
   GuardSpace in its frozen form (`train="B"`, a plain LoRA by content): same rows, rank, seed and settings.
3. Every model is measured on prompts that nothing above has seen. Writes report.json and report.png.

--full trains the patch too, and adds SaLoRA and a control: GuardSpace with a random basis of the same size. Another
--model needs it: the patch that ships is for SmolLM2-135M-Instruct.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel

from examples.demo_picture import draw
from examples.get_model import model_dir
from examples.options import command_line, machine, notes
from examples.safety_patch import attach, train
from peft_safety import GuardSpaceConfig, SafetySubspace, SaLoRAConfig
from peft_safety.data import CALIBRATION_PAIRS, load, refusal_pairs
from peft_safety.data.chat import Collator, encode_rows
from peft_safety.evaluation import Evaluation
from peft_safety.recipes.bench import Bench
from peft_safety.recipes.load import TaskData, load_model, poisoned, task_data
from peft_safety.recipes.train import TrainOptions, finetune
from peft_safety.reporting.report import Report

POISON = 0.1
LEARNING_RATE = 1e-3
"""As in the frontier: one epoch over so few rows hardly learns the task at half of it."""
SAFETY_RANK = 32
"""Output directions for SaLoRA, as published (arXiv 2501.01765, section 5.1)."""
FRACTION = 0.25
"""Of every layer's input dimensions, for GuardSpace: its default."""
GUARD_PAIRS = 16
"""Calibration requests: 64 and 128 do the same (docs/results)."""
DIRECTION_ROWS = 8
"""Training rows, poisoned ones among them, that the frozen factor takes its directions from."""
ALIGNED, LORA, GUARDSPACE, SALORA, CONTROL = "aligned", "plain LoRA", "GuardSpace", "SaLoRA", "random basis"


@dataclass(frozen=True)
class Scale:
    """How much of everything.

    Attributes:
        arms: fine-tuned models, beside the aligned one.
        patch: what of the patch's recipe is not its default, where the patch is trained; None attaches the one that
            ships with the examples.
        task_rows: to train on.
        eval_limit: prompts of each kind to measure on, at most.
        seconds: of each phase on two quiet cores, for the estimate of the time that is left.
    """

    arms: tuple[str, ...]
    patch: dict[str, Any] | None
    task_rows: int
    eval_limit: int
    seconds: dict[str, int]


SECONDS = {"load": 8, "patch": 4, "aligned": 25, "calibrate": 25, "arm": 105}
DEFAULT = Scale((LORA, GUARDSPACE), None, 88, 24, SECONDS)
FULL = Scale((LORA, SALORA, GUARDSPACE, CONTROL), {}, 128, 72, {**SECONDS, "patch": 5400, "aligned": 120, "arm": 190})
SMOKE = Scale((LORA, GUARDSPACE), None, 40, 12, {"load": 8, "patch": 4, "aligned": 25, "calibrate": 35, "arm": 50})


class Progress:
    """One line a phase: what goes on, how long it will take, and how much is left after it."""

    def __init__(self, plan: list[int]) -> None:
        self.plan, self.done, self.spent = plan, 0, 0.0
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Say that a phase begins, and time it."""
        pace = max(1.0, self.spent / sum(self.plan[: self.done])) if self.done else 1.0
        now, left = pace * self.plan[self.done], pace * sum(self.plan[self.done :])
        print(f"[{self.done + 1}/{len(self.plan)}] {name}: about {now:.0f} s ({spoken(left)} to go)", flush=True)
        started = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - started, 1)
        self.spent += self.seconds[name]
        self.done += 1


def spoken(seconds: float) -> str:
    """Seconds, or minutes from two of them on."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


class Demo:
    """The arms, and what they share: one aligned model, one bench, one seed."""

    def __init__(self, scale: Scale, poison: float, split: str, seed: int, lr: float = LEARNING_RATE) -> None:
        self.scale, self.poison, self.split = scale, poison, split
        self.options = TrainOptions(lr=lr, max_length=128, seed=seed)
        self.evaluations: dict[str, Evaluation] = {}
        self.details: dict[str, dict[str, Any]] = {}
        spaces = [{GUARDSPACE, CONTROL}, {SALORA}]
        cost = scale.seconds
        plan = [
            cost["load"],
            cost["patch"],
            cost["aligned"],
            *(cost["calibrate"] for s in spaces if s & {*scale.arms}),
            *(cost["arm"] for _ in scale.arms),
        ]
        self.progress = Progress(plan)

    def run(self, model_path: str) -> None:
        """Align, then fine-tune and measure every arm."""
        aligned = self.prepare(model_path)
        inputs = outputs = None
        if {GUARDSPACE, CONTROL} & {*self.scale.arms}:
            with self.progress.phase("calibrating GuardSpace"):
                inputs = self.estimate(aligned, "guardspace", FRACTION, GUARD_PAIRS)
        if SALORA in self.scale.arms:
            with self.progress.phase("calibrating SaLoRA"):
                outputs = self.estimate(aligned, "salora", SAFETY_RANK, CALIBRATION_PAIRS)
        for arm in self.scale.arms:
            with self.progress.phase(f"fine-tuning and measuring, {arm}"):
                aligned = self.arm(aligned, arm, outputs if arm == SALORA else inputs).unload()

    def prepare(self, model_path: str) -> PreTrainedModel:
        """Load, align, and measure the aligned model."""
        scale, seed = self.scale, self.options.seed
        with self.progress.phase("loading the model"):
            model, self.tokenizer = load_model(model_path)
            task = task_data(load("benign_task"), self.split, scale.eval_limit, seed)
            task = TaskData(random.Random(seed).sample(task.train, scale.task_rows), task.held_out, task.labels)
        aligned = self.align(model)
        with self.progress.phase("measuring the aligned model"):
            self.bench = Bench.prepare(
                aligned,
                self.tokenizer,
                task,
                self.options,
                split=self.split,
                limit=scale.eval_limit,
                drift=scale is FULL,
            )
            if scale is not FULL:  # half of the time of each measurement
                self.bench = replace(self.bench, prompts=replace(self.bench.prompts, everyday=()))
            self.evaluations[ALIGNED] = self.bench.measure(aligned, self.tokenizer)
        return aligned

    def align(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model with a safety patch merged in."""
        if self.scale.patch is None:
            with self.progress.phase("attaching the safety patch"):
                return attach(model)
        with self.progress.phase("training the safety patch"):
            patched, run, _ = train(model, self.tokenizer, self.options.seed, **self.scale.patch)
            self.details["safety patch"] = {**asdict(run.training), "looks": [asdict(look) for look in run.looks]}
            return patched.merge_and_unload()

    def estimate(self, aligned: PreTrainedModel, method: str, rank: float, pairs: int) -> SafetySubspace:
        """Of the aligned model, on calibration prompts and refusals: the outputs of "salora", or the inputs of
        "guardspace".
        """
        seed = self.options.seed
        how: dict[str, Any] = {"method": method, "rank": rank, "target_modules": "all-linear", "allow_fewer": True}
        rows = refusal_pairs("calibration", pairs, seed)
        return SafetySubspace.from_activations(aligned, rows, tokenizer=self.tokenizer, seed=seed, **how)

    def arm(self, aligned: PreTrainedModel, name: str, subspace: SafetySubspace | None) -> PeftModel:
        """Fine-tune and measure. The adapter is left on the aligned model."""
        seed, task = self.options.seed, self.bench.task
        rows = poisoned(task.train, self.poison, seed)
        chosen: Any = subspace.randomized(seed) if subspace is not None and name == CONTROL else subspace
        common: dict[str, Any] = {"r": 16, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        config: Any = LoraConfig(**common)
        if name == SALORA:
            config = SaLoRAConfig(**common, subspace=chosen)
        elif name != LORA:
            directions = encoded(rows[:DIRECTION_ROWS], self.tokenizer, task.labels, self.options.max_length)
            config = GuardSpaceConfig(**common, subspace=chosen, train="B", task_data=directions)
        tuned, run = finetune(aligned, self.tokenizer, rows, config, self.options, labels=task.labels)
        self.evaluations[name] = self.bench.measure(tuned, self.tokenizer)
        self.details[name] = asdict(run)
        return tuned

    def report(self, model_path: str) -> Report:
        """All arms, with what a reader needs to judge them."""
        rows = f"{self.poison:.0%} of the training rows are poisoned" if self.poison else "no row is poisoned"
        return Report(
            title=f"{Path(model_path).name}, fine-tuned on {self.scale.task_rows} rows: {rows}",
            arms={name: evaluation.figures() for name, evaluation in self.evaluations.items()},
            notes=notes(self.split, self.options.seed),
            environment=machine(self.options.seed, model_path),
            details={
                "seconds": self.progress.seconds,
                "training": self.details,
                "evaluations": {key: value.to_json() for key, value in self.evaluations.items()},
            },
        )


def encoded(rows: list[Any], tokenizer: Any, labels: list[str], max_length: int) -> list[dict[str, Any]]:
    """Rows of the task as batches of tokens, as training sees them."""
    features, collate = encode_rows(tokenizer, rows, max_length, labels), Collator(tokenizer)
    return [collate(features[i : i + 8]) for i in range(0, len(features), 8)]


def verdict(evaluations: dict[str, Evaluation]) -> str:
    """What the refusal rates say about the methods against plain LoRA, in one or two lines."""
    aligned, lora = evaluations[ALIGNED].refusal, evaluations[LORA].refusal
    lines = [
        f"Of {aligned.n} harmful requests, the aligned model refuses {aligned.value:.0%}; after fine-tuning by plain "
        f"LoRA {lora.value:.0%}"
    ]
    for name, evaluation in evaluations.items():
        if name not in (ALIGNED, LORA):
            found = evaluation.refusal
            apart = found.interval[0] > lora.interval[1] or found.interval[1] < lora.interval[0]
            lines.append(
                f"by {name} "
                f"{found.value:.0%}{'' if apart else ' (not shown to differ from plain LoRA by this run alone)'}"
            )
    return ", ".join(lines) + "."


def main() -> None:
    """Run the demo, and print, save and draw its report."""
    parser = command_line(__doc__, "runs/demo")
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--full",
        action="store_true",
        help="train the safety patch too, and add SaLoRA and a random basis (about two hours)",
    )
    size.add_argument("--smoke", action="store_true", help="few prompts and steps: figures too rough to quote")
    parser.add_argument("--no-poison", action="store_true", help="fine-tune on clean rows")
    given = parser.parse_args()

    started = time.perf_counter()
    model_path = given.model or str(model_dir())
    demo = Demo(
        FULL if given.full else SMOKE if given.smoke else DEFAULT,
        0.0 if given.no_poison else POISON,
        given.split,
        given.seed,
    )
    demo.run(model_path)
    report = demo.report(model_path)
    report.save(given.out / "report.json")
    draw(demo.evaluations, demo.poison, given.out / "report.png")
    print()
    report.print()
    print(verdict(demo.evaluations))
    print(
        f"{time.perf_counter() - started:.0f} s in all. Table: {given.out / 'report.json'}. Picture: "
        f"{given.out / 'report.png'}."
    )


if __name__ == "__main__":
    main()
