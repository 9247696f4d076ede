"""What does a safety patch cost, and what does keeping it out of the model's own directions buy? One small model, one
command.

    python -m examples.patch [--out runs/patch] [--arms "none;hard;..."]      (about 25 minutes on two cores)

SmolLM2-135M-Instruct refuses little by itself. It gets a safety patch (`peft_safety.recipes.patch`) in several ways,
from the same rows and settings:

- none: plain LoRA, the published method;
- hard: the update constrained to the complement of what general prompts use; soft: its energy there penalized;
- hard, random basis: hard, with a random basis of equal rank: the control;
- stacked: a second patch, from other rows, orthogonal to the first by construction; and the first one removed again.

Measured on prompts that nothing here has seen: refusal of harmful requests, over-refusal of safe ones (the package's
own, and XSTest's where its file is there), drift on general prompts, and whether the model still knows what it knew of
a task it was never trained on. Writes report.json and report.png.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from peft.tuners.lora import LoraLayer

from examples.get_model import model_dir
from examples.options import command_line, finish, machine, notes
from peft_safety import orthogonality_report
from peft_safety.calibration.sizes import DEFAULT_RANK
from peft_safety.data import load, read_jsonl, refusal_pairs
from peft_safety.evaluation import KeywordJudge, Rate
from peft_safety.evaluation.evaluate import refusal_rate
from peft_safety.evaluation.metrics import Figure
from peft_safety.evaluation.tasks import likeliest_labels
from peft_safety.methods.ortho_patch.config import REG_LAMBDA
from peft_safety.recipes.bench import JUDGED_TOKENS, Bench
from peft_safety.recipes.load import TaskData, load_model, task_data
from peft_safety.recipes.patch import PatchOptions, general_rows, patch, patch_config
from peft_safety.reporting.report import Report

XSTEST = Path("../shared/data/xstest.jsonl")
XSTEST_LIMIT = 100
TASK_ROWS = 64
CONTROL = "hard, random basis"
ARMS = ("none", "hard", "soft", CONTROL, "stacked")


class Comparison:
    """One model, one set of prompts, many patches."""

    def __init__(self, model_path: str, split: str, seed: int, xstest: Path) -> None:
        defaults = PatchOptions()
        self.options = replace(defaults, training=replace(defaults.training, seed=seed))
        self.model, self.tokenizer = load_model(model_path)
        self.task = task_data(load("benign_task"), split, TASK_ROWS, seed)
        self.bench = Bench.prepare(
            self.model, self.tokenizer, TaskData([], [], []), self.options.training, split=split
        )
        self.xstest = (
            [row["prompt"] for row in read_jsonl(xstest) if row.get("label") == "safe"][:: 250 // XSTEST_LIMIT]
            if xstest.is_file()
            else []
        )
        self.arms: dict[str, dict[str, Figure]] = {}
        self.details: dict[str, Any] = {}
        self.current = ""

    def measure(self, name: str, model: Any) -> None:
        """All figures of one arm."""
        figures = self.bench.measure(model, self.tokenizer).figures()
        if self.xstest:
            figures["over-refusal, XSTest safe"] = refusal_rate(
                model, self.tokenizer, self.xstest, KeywordJudge(), max_new_tokens=JUDGED_TOKENS, description="XSTest"
            )
        figures["untrained task, likeliest label"] = Rate.of(
            likeliest_labels(model, self.tokenizer, self.task.held_out, self.task.labels)
        )
        self.arms[name] = figures
        if hasattr(model, "peft_config"):
            self.details[f"audit of {name}"] = self.audit(model)
        print(f"   {name}: " + ", ".join(f"{heading} {figure}" for heading, figure in figures.items()), flush=True)

    def audit(self, model: Any) -> dict[str, Any]:
        """Where the newest patch lies, and what it does to general and to harmful inputs: medians over the modules."""
        sets = {"general": self.bench.general, "harmful": refusal_pairs("validation")}
        found = orthogonality_report(
            model, list(model.peft_config)[-1], calibration=sets, tokenizer=self.tokenizer
        ).summary
        shown = ("z", "energy_ratio", "relative_norm", "general", "harmful", "interference_ratio")
        print("   medians: " + ", ".join(f"{key} {found[key]:.3g}" for key in shown), flush=True)
        return {key: value for key, value in found.items() if not math.isnan(value)}

    def patch(self, model: Any, options: PatchOptions, **given: Any) -> Any:
        """Train one patch; returns the model under it."""
        started = time.perf_counter()
        tuned, run = patch(model, self.tokenizer, options, **given)
        name = given.get("adapter_name", "default")
        self.details[f"patch of {self.current}, {name}"] = {
            "seconds": round(time.perf_counter() - started),
            "looks": [asdict(look) for look in run.looks],
            "kept": asdict(run.best) if run.best else None,
            "training": asdict(run.training),
            "k": sorted(
                {u.shape[1] for sides in tuned.peft_config[name].subspace.bases.values() for u in sides.values()}
            ),
        }
        return tuned

    def arm(self, name: str) -> None:
        """One patch on the bare model, measured, and taken off again."""
        print(f"-> {name}", flush=True)
        self.current = name
        if name == "stacked":
            self.stacked()
            return
        options = replace(self.options, mode=name.partition(",")[0])
        if name == CONTROL:
            options = replace(options, subspace=self.subspace().randomized(self.options.training.seed))
        tuned = self.patch(self.model, options)
        self.measure(name, tuned)
        self.model = tuned.unload()

    def subspace(self) -> Any:
        """What "hard" is kept out of."""
        rows = general_rows(self.model, self.tokenizer, self.options)
        return patch_config(self.model, self.tokenizer, self.options, rows).subspace

    def stacked(self) -> None:
        """A first patch from half of the rows, a second one from the other half on top of it; then the first one
        goes.
        """
        pairs = refusal_pairs("train", self.options.harmful, self.options.training.seed)
        first = self.patch(self.model, self.options, refusals=pairs[::2], adapter_name="first")
        self.measure("first of two", first)
        both = self.patch(
            first, replace(self.options, prior_patches=("first",)), refusals=pairs[1::2], adapter_name="second"
        )
        self.measure("both, stacked", both)
        self.details["orthogonality"] = overlap(both, "first", "second")
        self.details["capacity left"] = both.peft_config["second"].subspace.provenance["capacity_left"]
        both.delete_adapter("first")
        both.base_model.set_adapter(["second"])
        self.measure("second alone, first removed", both)
        self.model = both.unload()


def overlap(model: Any, one: str, other: str) -> float:
    """Largest `|<dW_i, dW_j>| / (||dW_i|| ||dW_j||)` of any module."""
    worst = 0.0
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and one in layer.lora_A and other in layer.lora_A:
            d, e = (layer.get_delta_weight(name).detach().double() for name in (one, other))
            worst = max(worst, abs(float((d * e).sum() / (d.norm() * e.norm()))))
    return worst


def main() -> None:
    """Run it, and print, save and draw the report."""
    parser = command_line(__doc__, "runs/patch")
    parser.add_argument(
        "--xstest",
        type=Path,
        default=XSTEST,
        help="JSON lines of {prompt, label, type}; left out where there is no such file",
    )
    parser.add_argument("--arms", default=";".join(ARMS), help="separated by semicolons")
    parser.add_argument(
        "--keep",
        action="store_true",
        help="keep what OUT/report.json has, and run only --arms again (same split, seed and machine)",
    )
    given = parser.parse_args()
    arms = [name.strip() for name in given.arms.split(";")]
    if unknown := [name for name in arms if name not in ARMS]:
        parser.error(f"--arms {unknown[0]!r}. Known, separated by semicolons: {'; '.join(ARMS)}")

    started = time.perf_counter()
    model_path = given.model or str(model_dir())
    run = Comparison(model_path, given.split, given.seed, given.xstest)
    if given.keep:
        before = Report.load(given.out / "report.json")
        run.arms, run.details = {arm: dict(figures) for arm, figures in before.arms.items()}, dict(before.details)
    if "unpatched" not in run.arms:
        run.measure("unpatched", run.model)
    for name in arms:
        run.arm(name)
    options = run.options
    energy, rank = options.safety_energy, options.safety_rank or DEFAULT_RANK
    size = f"{energy:.0%} of the energy" if energy else f"safety_rank = {rank}"
    report = Report(
        title="SmolLM2-135M: safety patches" if "SmolLM2-135M" in model_path else f"{model_path}: safety patches",
        arms=run.arms,
        notes=(
            *notes(given.split, given.seed),
            f"Constrained arms: basis of {options.basis} data, side {options.side}, {size} in every linear layer; r = "
            f"{options.r}.",
            f"soft: lambda = {REG_LAMBDA:g}.",
        ),
        environment=machine(given.seed, model_path),
        details=run.details,
    )
    finish(report, given.out, started)


if __name__ == "__main__":
    main()
