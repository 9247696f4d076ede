"""What all scripts here share: command-line options, notes for a reader, and the end."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from peft_safety.evaluation import KeywordJudge
from peft_safety.reporting.report import Report, environment


def command_line(description: str | None, out: str) -> argparse.ArgumentParser:
    """A parser with --out (default `out`), --model, --split and --seed."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--out", type=Path, default=Path(out), help="directory of everything that is written")
    result.add_argument(
        "--model", help="hub id or directory of an instruct model; default SmolLM2-135M-Instruct, fetched when missing"
    )
    result.add_argument(
        "--split",
        choices=("validation", "test"),
        default="test",
        help="choose settings on validation; look at test once",
    )
    result.add_argument("--seed", type=int, default=0)
    return result


def notes(split: str, seed: int) -> tuple[str, ...]:
    """What a reader of any of these figures needs."""
    judge = f"Judge: {KeywordJudge.name}. {KeywordJudge.caveat}"
    return (judge, f"Prompts and task rows: {split} split; one seed ({seed}): small differences mean nothing.")


def machine(seed: int, model: str, **more: object) -> dict[str, object]:
    """Seed, model, versions and threads."""
    return environment(seed, model=Path(model).name, threads=torch.get_num_threads(), **more)


def finish(report: Report, out: Path, started: float) -> None:
    """Save, draw and print a report."""
    report.write(out)
    report.print()
    print(f"{time.perf_counter() - started:.0f} s in all. Wrote {out / 'report.json'} and {out / 'report.png'}.")
