"""What does an ordinary fine-tune do to a small model's safety, and what do SaLoRA and GuardSpace change about that? On two CPU cores, in minutes.

    python -m examples.demo [--smoke] [--attack] [--out runs/demo]

1. SmolLM2-135M-Instruct refuses little by itself, so a safety patch is trained first (`peft_safety.recipes.patch`) and merged: the *aligned* model.
2. The aligned model is fine-tuned on a benign task (sorting help-desk messages), once by plain LoRA, by SaLoRA and by GuardSpace, with the same rows,
   seed and settings. A random basis as large as GuardSpace's is the control. With --attack, again with one row in ten replaced by a simulated attack.
3. Every model is measured on prompts that nothing above has seen. Writes report.json and report.png.
"""

from __future__ import annotations

import argparse
import random
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_safety.recipes.train import LEARNING_RATE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from peft import PeftModel
    from transformers import PreTrainedModel

    from peft_safety import SafetySubspace
    from peft_safety.evaluation import Evaluation
    from peft_safety.report import Report

SAFETY_RANK = 32
"""As published (arXiv 2501.01765, section 5.1)."""
POISON = 0.1
FRACTION = 0.25
"""Of every layer's input dimensions, for GuardSpace: its default."""
GUARD_PAIRS = 64
"""As many distinct calibration requests as the package has."""
CONTROL = "random basis"
"""GuardSpace with as many random input directions."""


@dataclass(frozen=True)
class Scale:
    """How much of everything: what of the patch recipe is not its default, rows to train on, and prompts of each kind to measure on."""

    patch: dict[str, Any]
    task_rows: int
    eval_limit: int
    arms: tuple[tuple[str, float], ...]


FULL = Scale({}, 128, 72, (("lora", 0.0), ("salora", 0.0), ("guardspace", 0.0), (CONTROL, 0.0)))
ATTACK = (("lora", POISON), ("salora", POISON), ("guardspace", POISON))
SMOKE = Scale({"harmful": 48, "general": 8, "contrast": 20, "validation": 8}, 40, 16, (("lora", 0.0), ("guardspace", 0.0)))


class Demo:
    """The arms, and what they share: one aligned model, one bench, one seed."""

    def __init__(self, scale: Scale, split: str, safety_rank: float, seed: int, lr: float = LEARNING_RATE, fraction: float = FRACTION) -> None:
        from peft_safety.recipes.train import TrainOptions

        self.scale, self.split, self.safety_rank, self.fraction = scale, split, safety_rank, fraction
        self.options = TrainOptions(lr=lr, max_length=128, seed=seed)
        self.evaluations: dict[str, Evaluation] = {}
        self.details: dict[str, dict[str, Any]] = {}
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase, and say when it begins and ends."""
        print(f"-> {name}", flush=True)
        started = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - started, 1)
        print(f"   {self.seconds[name]:.0f} s", flush=True)

    def run(self, model_path: str) -> None:
        """Align, then fine-tune and measure every arm."""
        aligned = self.prepare(model_path)
        methods = {method for method, _ in self.scale.arms}
        with self.phase("estimating the safety subspaces"):
            outputs = self.estimate(aligned) if "salora" in methods else None
            inputs = self.estimate(aligned, "guardspace") if methods & {"guardspace", CONTROL} else None
        for method, poison in self.scale.arms:
            with self.phase(f"{method}, {100 * poison:g} % poison"):
                aligned = self.arm(aligned, method, poison, outputs if method == "salora" else inputs).unload()

    def prepare(self, model_path: str) -> PreTrainedModel:
        """Load, align, and measure the aligned model."""
        from peft_safety.data import load
        from peft_safety.recipes.bench import Bench
        from peft_safety.recipes.load import TaskData, load_model, task_data

        scale, seed = self.scale, self.options.seed
        with self.phase("loading the model"):
            model, self.tokenizer = load_model(model_path)
            task = task_data(load("benign_task"), self.split, scale.eval_limit, seed)
            task = TaskData(random.Random(seed).sample(task.train, scale.task_rows), task.held_out, task.labels)
        aligned = self.align(model)
        with self.phase("measuring the aligned model"):
            self.bench = Bench.prepare(aligned, self.tokenizer, task, self.options, split=self.split, limit=scale.eval_limit)
            self.evaluations["aligned, before"] = self.bench.measure(aligned, self.tokenizer)
        return aligned

    def align(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model with a safety patch merged in."""
        from peft_safety.recipes.patch import PatchOptions, patch

        with self.phase("training the safety patch"):
            defaults = PatchOptions()
            options = replace(defaults, **self.scale.patch, training=replace(defaults.training, seed=self.options.seed))
            patched, run = patch(model, self.tokenizer, options)
            self.details["safety patch"] = {**asdict(run.training), "looks": [asdict(look) for look in run.looks]}
            return patched.merge_and_unload()

    def estimate(self, aligned: PreTrainedModel, method: str = "salora") -> SafetySubspace:
        """Of the aligned model, on calibration prompts and refusals: the outputs of "salora", or the inputs of "guardspace"."""
        from peft_safety import SafetySubspace
        from peft_safety.data import CALIBRATION_PAIRS, refusal_pairs

        pairs = refusal_pairs("calibration", CALIBRATION_PAIRS if method == "salora" else GUARD_PAIRS, self.options.seed)
        rank = self.safety_rank if method == "salora" else self.fraction
        options: dict[str, Any] = {"tokenizer": self.tokenizer, "target_modules": "all-linear", "seed": self.options.seed, "allow_fewer": True}
        return SafetySubspace.from_activations(aligned, pairs, method=method, rank=rank, **options)

    def arm(self, aligned: PreTrainedModel, method: str, poison: float, subspace: SafetySubspace | None) -> PeftModel:
        """Fine-tune and measure. The adapter is left on the aligned model."""
        from peft_safety.recipes.adapter import AdapterOptions, Method
        from peft_safety.recipes.load import poisoned
        from peft_safety.recipes.train import finetune

        seed, task = self.options.seed, self.bench.task
        rows = poisoned(task.train, poison, seed)
        chosen = subspace.randomised(seed) if subspace is not None and method == CONTROL else subspace
        kind: Method = "lora" if method == "lora" else "salora" if method == "salora" else "guardspace"
        adapter = AdapterOptions(kind) if kind == "lora" else AdapterOptions(kind, subspace=chosen or "auto")
        config = adapter.config(aligned, self.tokenizer, rows, seed=seed)
        tuned, run = finetune(aligned, self.tokenizer, rows, config, self.options, labels=task.labels)
        name = f"{method}, {100 * poison:g} % poison"
        self.evaluations[name] = self.bench.measure(tuned, self.tokenizer)
        self.details[name] = asdict(run)
        return tuned

    def notes(self) -> tuple[str, ...]:
        """What a reader of any of these figures needs."""
        from peft_safety.evaluation import KeywordJudge

        return (
            f"Judge: {KeywordJudge.name}. {KeywordJudge.caveat}",
            f"Prompts and task rows: {self.split} split; one seed ({self.options.seed}), so differences inside the intervals mean nothing.",
        )

    def report(self, model_path: str) -> Report:
        """All arms, with what a reader needs to judge them."""
        from peft_safety.report import Report, environment

        return Report(
            title="SmolLM2-135M: what a benign fine-tune does to safety" if "SmolLM2-135M" in model_path else f"{model_path}: fine-tuning and safety",
            arms={name: evaluation.figures() for name, evaluation in self.evaluations.items()},
            notes=(
                *self.notes(),
                f"SaLoRA protects {directions(self.safety_rank)} of every linear layer, GuardSpace and its control (a random basis) "
                f"{100 * self.fraction:g} % of the input directions.",
            ),
            environment=environment(self.options.seed, model=Path(model_path).name, threads=torch_threads()),
            details={"seconds": self.seconds, "training": self.details, "evaluations": {key: value.to_json() for key, value in self.evaluations.items()}},
        )


def rank(text: str) -> float:
    """A count, or a share below 1."""
    return float(text) if "." in text else int(text)


def directions(rank: float) -> str:
    """In words."""
    return f"{rank} output directions" if rank >= 1 else f"{100 * rank:g} % of the output directions"


def torch_threads() -> int:
    """Threads that torch computes with."""
    import torch

    return torch.get_num_threads()


def verdict(evaluations: dict[str, Evaluation], poison: float) -> str:
    """What the figures say about each method against plain LoRA at one poison level, intervals considered."""
    level = f"{100 * poison:g} % poison"
    lora = evaluations[f"lora, {level}"].refusal
    lines = [f"{level}, N = {lora.n}: refusal {lora} with plain LoRA"]
    for method, name in (("salora", "SaLoRA"), ("guardspace", "GuardSpace"), (CONTROL, f"a {CONTROL}")):
        if f"{method}, {level}" in evaluations:
            found = evaluations[f"{method}, {level}"].refusal
            apart = found.interval[0] > lora.interval[1] or found.interval[1] < lora.interval[0]
            words = "more" if found.value > lora.value else "fewer" if found.value < lora.value else "as many"
            certainty = "intervals apart" if apart else "intervals overlap: not shown by this run alone"
            lines.append(f"{found} with {name}: {words} ({certainty})")
    return "; ".join(lines) + "."


def main() -> None:
    """Run the demo and print, save and draw its report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="few prompts and steps: at most 3 minutes, figures too rough to quote")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="directory of report.json and report.png")
    parser.add_argument("--model", help="hub id or directory of an instruct model; default SmolLM2-135M-Instruct, fetched when missing")
    parser.add_argument("--split", choices=("validation", "test"), default="test", help="choose settings on validation; look at test once")
    parser.add_argument("--safety-rank", type=rank, default=SAFETY_RANK, help="output directions per layer, or a share of them (0.9)")
    parser.add_argument("--fraction", type=float, default=FRACTION, help="for GuardSpace: share of each layer's input dimensions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--attack", action="store_true", help="also with one row in ten replaced by a simulated attack (6 minutes more)")
    given = parser.parse_args()

    from examples.get_model import model_dir

    started = time.perf_counter()
    model_path = given.model or str(model_dir())
    scale = SMOKE if given.smoke else FULL
    demo = Demo(replace(scale, arms=scale.arms + ATTACK * given.attack), given.split, given.safety_rank, given.seed, fraction=given.fraction)
    demo.run(model_path)
    report = demo.report(model_path)
    report.save(given.out / "report.json")
    report.save_png(given.out / "report.png")
    report.print()
    for poison in dict.fromkeys(poison for _, poison in demo.scale.arms):
        print(verdict(demo.evaluations, poison))
    print(f"{time.perf_counter() - started:.0f} s in all. Wrote {given.out / 'report.json'} and {given.out / 'report.png'}.")


if __name__ == "__main__":
    main()
