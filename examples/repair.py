"""Safe LoRA on a real, poisoned adapter: train it, break the model with it, repair it by the command line, measure all
three.

    python -m examples.repair [--out runs/repair]      (about 8 minutes on two cores)

The unaligned model is SmolLM2-135M-Instruct, the aligned one the same with the safety patch of the demo merged in. A
plain LoRA is fine-tuned on the demo's task with one row in ten replaced by a simulated attack; `peft-safety repair`
then projects it, with every projection, and each result is measured, beside the
control: the same LoRA, each module merely shortened to the norm that "soft" leaves it. No other --model: the patch is
for this one (`python -m examples.demo --full` trains one for another model).
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer

from examples.demo import DEFAULT, LORA, POISON, Demo
from examples.get_model import model_dir
from examples.options import command_line, finish, machine, notes
from peft_safety.recipes.train import LEARNING_RATE
from peft_safety.reporting.report import Report

ATTACK_RATE = 2 * LEARNING_RATE
"""Twice the usual learning rate: an attack that shows."""
REPAIRS: tuple[tuple[str, ...], ...] = (
    ("--projection", "frobenius"),
    ("--select", "all", "--projection", "topk"),
    ("--select", "all", "--projection", "soft"),
)


def scaled(model: Any, factors: dict[str, float]) -> Any:
    """The control that tells direction from size: every module's update made as short as the repair made it."""
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, LoraLayer):
            layer.scaling["default"] *= factors[name]
    return model


def main() -> None:
    """Run it, and print, save and draw the report."""
    given, started = command_line(__doc__, "runs/repair").parse_args(), time.perf_counter()
    scale = replace(DEFAULT, arms=(LORA,), eval_limit=72)
    demo, source = Demo(scale, POISON, given.split, given.seed, ATTACK_RATE), Path(given.model or model_dir())
    aligned = demo.prepare(str(source))
    aligned_dir, broken = given.out / "aligned", given.out / "adapter"
    aligned.save_pretrained(aligned_dir)
    aligned.config._name_or_path = aligned.name_or_path = str(
        aligned_dir
    )  # what the adapter is trained on, and says so
    with demo.progress.phase("plain LoRA on poisoned data"):
        tuned = demo.arm(aligned, LORA, None)
    tuned.save_pretrained(str(broken))
    aligned = tuned.unload()
    details = {}
    for options in REPAIRS:
        name = " ".join(options).replace("--", "")
        out = given.out / name.replace(" ", "-")
        command = [sys.executable, "-m", "peft_safety", "repair", broken, "--unaligned", source]
        command += ["--aligned", aligned_dir, "--out", out, "--png", given.out / f"{out.name}.png", "--json", *options]
        done = subprocess.run(list(map(str, command)), check=False, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(done.returncode)  # the command has said why
        details[name] = json.loads(done.stdout)
        repaired = PeftModel.from_pretrained(aligned, str(out))
        demo.evaluations[f"repaired: {name} ({details[name]['repaired']} modules)"] = demo.bench.measure(
            repaired, demo.tokenizer
        )
        aligned = repaired.unload()
    scales = {row["name"]: row["gain"] for row in details[" ".join(REPAIRS[-1]).replace("--", "")]["modules"]}
    shrunk = scaled(PeftModel.from_pretrained(aligned, str(broken)), scales)
    demo.evaluations["lora, each module scaled to the norm that soft keeps"] = demo.bench.measure(
        shrunk, demo.tokenizer
    )
    report = Report(
        title="SmolLM2-135M: a poisoned LoRA, repaired by Safe LoRA",
        arms={name: evaluation.figures() for name, evaluation in demo.evaluations.items()},
        notes=notes(given.split, given.seed),
        environment=machine(given.seed, source.name, lr=ATTACK_RATE),
        details={"repairs": details},
    )
    finish(report, given.out, started)


if __name__ == "__main__":
    main()
