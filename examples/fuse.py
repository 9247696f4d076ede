"""Two tasks and a safety patch in one adapter: what task arithmetic and a learned safety mask (SOMF) make of them.

    python -m examples.fuse [--smoke] [--data rows.jsonl] [--out runs/fuse]      (about 13 minutes on two cores)

1. A safety patch is trained on SmolLM2-135M-Instruct: the safe adapter.
2. Two adapters are trained on from it: one on sorting help-desk messages (or --data), one on sorting headlines with
one row in ten replaced by a simulated
   attack.
3. The three are fused without a mask, and with a learned one. SOMF's mask is trained by DPO on the training split's
requests, with refusals against contentless openings, and on prompts that only look dangerous, with the model's own
answers against refusals. A random mask of equal density is its control.
4. Everything is measured on prompts and rows that nothing above has seen. Writes report.json, report.png and the fused
adapter.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from peft import PeftModel

from examples.get_model import model_dir
from examples.options import command_line, finish, machine, notes
from peft_safety import export_lora, fuse
from peft_safety.data import load, preference_pairs, read_jsonl, refusal_pairs
from peft_safety.evaluation import Rate, self_responses
from peft_safety.evaluation.tasks import exact_answers
from peft_safety.methods.somf import FuseReport, MaskTraining
from peft_safety.recipes.bench import Bench
from peft_safety.recipes.load import TaskData, load_model, poisoned, task_data
from peft_safety.recipes.patch import PatchOptions, patch
from peft_safety.recipes.train import LEARNING_RATE, TrainOptions, finetune
from peft_safety.reporting.report import Report

POISON = 0.1
ATTACK_RATE = 2 * LEARNING_RATE
"""Twice the usual learning rate: an attack that shows, as in `examples.repair`."""
WEIGHT = 0.5
"""Of each task vector, in every fusion: the average of the two. The published 0.3 belongs to more tasks."""
TASKS = ("help desk", "headlines")
ADAPTERS = ("first", "second")


@dataclass(frozen=True)
class Scale:
    """How much of everything: what of the patch recipe is not its default, rows to train on, preference pairs, steps
    of the mask, and prompts of each kind to measure on."""

    patch: dict[str, Any]
    task_rows: int
    pairs: int
    safe_pairs: int
    mask_steps: int
    eval_limit: int


FULL = Scale({}, 160, 112, 56, 30, 72)
BRIEF = {"harmful": 24, "general": 4, "everyday": 4, "contrast": 8, "self_written": 0, "validation": 4}
SMOKE = Scale(BRIEF, 16, 4, 2, 2, 4)


class Fusing:
    """One PeftModel that collects all adapters, and what they are measured on."""

    def __init__(self, scale: Scale, given: argparse.Namespace) -> None:
        self.scale, self.given = scale, given
        self.names = (given.data.name if given.data else TASKS[0], TASKS[1])
        self.options = TrainOptions(lr=ATTACK_RATE, max_length=128, seed=given.seed)
        self.arms: dict[str, dict[str, Any]] = {}
        self.details: dict[str, Any] = {"seconds": {}}
        self.asked: set[str] = set()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase, and say when it begins and ends."""
        print(f"-> {name}", flush=True)
        started = time.perf_counter()
        yield
        self.details["seconds"][name] = round(time.perf_counter() - started, 1)
        print(f"   {self.details['seconds'][name]:.0f} s", flush=True)

    def prepare(self, source: str) -> None:
        """The safe adapter, and what everything is measured on."""
        scale, given = self.scale, self.given
        with self.phase("loading the model"):
            base, self.tokenizer = load_model(source)
            self.tasks = [
                self.task(read_jsonl(given.data) if given.data else load("benign_task")),
                self.task(load("second_task")),
            ]
        with self.phase("training the safety patch"):
            prompts = [row["prompt"] for row in load("contrast_prompts", "train")][: scale.safe_pairs]
            self.answers = self_responses(base, self.tokenizer, prompts, max_new_tokens=16)
            defaults = PatchOptions()
            options = replace(defaults, **scale.patch, training=replace(defaults.training, seed=given.seed))
            patched, run = patch(base, self.tokenizer, options)
            self.details["safety patch"] = {**asdict(run.training), "looks": [asdict(look) for look in run.looks]}
        export_lora(
            patched, given.out / "safe"
        )  # plain: the task adapters go on from it, and a constraint would bind them too
        model = self.model = PeftModel.from_pretrained(patched.unload(), str(given.out / "safe"))
        self.bench = Bench.prepare(
            model, self.tokenizer, self.tasks[0], self.options, split=given.split, limit=scale.eval_limit
        )
        self.measure("safe adapter", "default")

    def task(self, rows: list[dict[str, Any]]) -> TaskData:
        """At most `task_rows` training rows and `eval_limit` held-out ones."""
        found = task_data(rows, self.given.split, self.scale.eval_limit, self.given.seed)
        few = random.Random(self.given.seed).sample(found.train, min(self.scale.task_rows, len(found.train)))
        return TaskData(few, found.held_out, found.labels)

    def train_tasks(self) -> None:
        """Both task adapters, each trained on from the safe one; the second on poisoned rows."""
        for adapter, name, task, poison in zip(ADAPTERS, self.names, self.tasks, (0.0, POISON), strict=True):
            with self.phase(f"fine-tuning on {name}, {100 * poison:g} % poison"):
                self.model.load_adapter(str(self.given.out / "safe"), adapter, is_trainable=True)
                self.model.set_adapter(adapter)
                rows = poisoned(task.train, poison, self.given.seed)
                self.asked |= {row["prompt"] for row in rows if "prompt" in row}
                _, run = finetune(self.model, self.tokenizer, rows, None, self.options, labels=task.labels)
                self.details[name] = asdict(run)
            self.measure(f"{name}, {100 * poison:g} % poison", adapter)

    def fuse_all(self) -> None:
        """Without a mask, with a learned one, and with a random one of equal density."""
        weight = self.given.weight
        self.fuse("task arithmetic", method="task_arithmetic", weights=weight)
        with self.phase("training SOMF's mask"):
            report = self.learn(weight)
        self.measure("SOMF", "somf")
        if report.masks is not None:
            self.fuse(
                "random mask (control)",
                mask=report.masks.shuffled(self.given.seed),
                weights=weight,
            )

    def fuse(self, name: str, **options: Any) -> FuseReport:
        """One fusion, under a name of its own, measured."""
        adapter = name.split(" ", maxsplit=1)[0].lower()
        shared: dict[str, Any] = {"model": self.model, "adapter_name": adapter, "seed": self.given.seed}
        report = fuse("default", ADAPTERS, **shared, **options)
        self.details[name] = report.record
        self.measure(name, adapter)
        return report

    def learn(self, weight: float) -> FuseReport:
        """SOMF by DPO, without the requests of the poison; the result is also written."""
        scale, seed = self.scale, self.given.seed
        refusals = [row["response"] for row in refusal_pairs("train", max(1, len(self.answers)), seed)]
        safe = [
            {"prompt": row["prompt"], "chosen": row["response"], "rejected": refusal, "truncated": row["truncated"]}
            for row, refusal in zip(self.answers, refusals, strict=False)
        ]
        pairs = [pair for pair in preference_pairs("train", seed=seed) if pair["prompt"] not in self.asked]
        rows = [*pairs[: scale.pairs], *safe]
        training = MaskTraining(
            lr=self.given.mask_lr, max_steps=scale.mask_steps, batch_size=8, max_length=96, seed=seed
        )
        report = fuse(
            "default",
            ADAPTERS,
            model=self.model,
            tokenizer=self.tokenizer,
            data=rows,
            training=training,
            out=self.given.out / "somf",
            adapter_name="somf",
            weights=weight,
            rescale=self.given.rescale,
            seed=seed,
        )
        self.details["SOMF"] = {**report.record, "run": asdict(report.run) if report.run else None}
        return report

    def measure(self, name: str, adapter: str) -> None:
        """Safety, both accuracies and drift of one adapter."""
        with self.phase(f"measuring {name}"):
            self.model.set_adapter(adapter)
            figures = self.bench.measure(self.model, self.tokenizer).figures()
            figures[f"accuracy, {self.names[0]}"] = figures.pop("task accuracy")
            second = self.tasks[1]
            correct = exact_answers(self.model, self.tokenizer, second.held_out, second.labels)
            figures[f"accuracy, {self.names[1]}"] = Rate.of(correct)
            self.arms[name] = figures

    def report(self, model: str) -> Report:
        """All arms, with what a reader needs to judge them."""
        given = self.given
        return Report(
            title=f"{model}: a safety patch and two tasks, one of them poisoned, fused",
            arms=self.arms,
            notes=(
                *notes(given.split, given.seed),
                f"Every fusion weighs each task vector by {given.weight:g}. The random mask keeps as many entries of "
                "every tensor as SOMF's.",
            ),
            environment=machine(
                given.seed, model, lr=ATTACK_RATE, mask_lr=given.mask_lr, weight=given.weight, rescale=given.rescale
            ),
            details=self.details,
        )


def main() -> None:
    """Run it, and print, save and draw the report."""
    parser = command_line(__doc__, "runs/fuse")
    parser.add_argument(
        "--smoke", action="store_true", help="a few rows of everything: does it run? Figures mean nothing"
    )
    parser.add_argument(
        "--data",
        type=Path,
        help="JSON lines {text, label} in place of the help-desk task, for example banking intents",
    )
    parser.add_argument("--weight", type=float, default=WEIGHT, help="of each task vector")
    parser.add_argument("--mask-lr", type=float, default=1e-1, help="peak learning rate of the mask's logits")
    parser.add_argument("--rescale", choices=("mean", "none"), default="mean")
    given = parser.parse_args()

    started = time.perf_counter()
    source = given.model or str(model_dir())
    job = Fusing(SMOKE if given.smoke else FULL, given)
    job.prepare(source)
    job.train_tasks()
    job.fuse_all()
    finish(job.report(Path(source).name), given.out, started)


if __name__ == "__main__":
    main()
