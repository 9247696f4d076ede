"""Safe LoRA on a real, poisoned adapter: train it, break the model with it, repair it by the command line, measure all three.

    python -m examples.repair [--out runs/repair]      (about 8 minutes on two cores)

The unaligned model is SmolLM2-135M-Instruct, the aligned one the same with the refusal patch of the demo merged in. A plain LoRA is fine-tuned on the demo's
task with one row in ten replaced by a simulated attack; `peft-safety repair` then projects it, with every projection, and each result is measured.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from examples.demo import FULL, POISON, Demo, torch_threads

LEARNING_RATE = 1e-3
"""Twice the demo's: an attack that shows."""
REPAIRS: tuple[tuple[str, ...], ...] = (("--projection", "frobenius"), ("--select", "all", "--projection", "topk"), ("--select", "all", "--projection", "soft"))


def main() -> None:
    """Run it, and print, save and draw the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/repair"))
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()

    import random

    from peft import LoraConfig, PeftModel

    from examples.get_model import model_dir
    from peft_safety.data import load
    from peft_safety.evaluation import KeywordJudge
    from peft_safety.recipes.bench import Bench
    from peft_safety.recipes.load import TaskData, load_model, poisoned, task_data
    from peft_safety.recipes.train import finetune
    from peft_safety.report import Report, environment

    demo, source = Demo(FULL, given.split, 32, given.seed), model_dir()
    demo.options = replace(demo.options, lr=LEARNING_RATE)
    model, tokenizer = load_model(str(source))
    demo.tokenizer = tokenizer
    task = task_data(load("benign_task"), given.split, FULL.eval_limit, given.seed)
    task = TaskData(random.Random(given.seed).sample(task.train, FULL.task_rows), task.held_out, task.labels)
    aligned = demo.align(model)
    aligned_dir, broken = given.out / "aligned", given.out / "adapter"
    aligned.save_pretrained(aligned_dir)
    aligned.config._name_or_path = aligned.name_or_path = str(aligned_dir)  # what the adapter is trained on, and says so
    bench = Bench.prepare(aligned, tokenizer, task, demo.options, split=given.split, limit=FULL.eval_limit)
    arms = {"aligned, before": bench.measure(aligned, tokenizer)}
    config = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned, _ = finetune(aligned, tokenizer, poisoned(task.train, POISON, given.seed), config, demo.options, labels=task.labels)
    arms["plain LoRA, 10 % poison"] = bench.measure(tuned, tokenizer)
    tuned.save_pretrained(str(broken))
    aligned = tuned.unload()
    details = {}
    for options in REPAIRS:
        name = " ".join(options).replace("--", "")
        out = given.out / name.replace(" ", "-")
        command = [sys.executable, "-m", "peft_safety", "repair", str(broken), "--unaligned", str(source), "--aligned", str(aligned_dir), "--out", str(out)]
        picture = ["--png", str(given.out / f"{out.name}.png"), "--json"]
        done = subprocess.run([*command, *options, *picture], check=False, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(done.returncode)  # the command has said why
        details[name] = json.loads(done.stdout)
        repaired = PeftModel.from_pretrained(aligned, str(out))
        arms[f"repaired: {name} ({details[name]['repaired']} modules)"] = bench.measure(repaired, tokenizer)
        aligned = repaired.unload()
    report = Report(
        title="SmolLM2-135M: a poisoned LoRA, repaired by Safe LoRA",
        arms={name: evaluation.figures() for name, evaluation in arms.items()},
        notes=(
            f"Judge: {KeywordJudge.name}. {KeywordJudge.caveat}",
            f"Prompts and task rows: {given.split} split; one seed ({given.seed}), so differences inside the intervals mean nothing.",
        ),
        environment=environment(given.seed, model=source.name, lr=LEARNING_RATE, threads=torch_threads()),
        details={"repairs": details},
    )
    report.save(given.out / "report.json")
    report.save_png(given.out / "report.png")
    report.print()


if __name__ == "__main__":
    main()
