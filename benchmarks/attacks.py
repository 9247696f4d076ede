"""What the defenses survive: attacks through the training rows, each against plain LoRA first. A third plan of cells
for the engine in `benchmarks/frontier`.

    python -m benchmarks.attacks [--defenses lora frozen ...] [--budget MINUTES]
                                             run the missing cells; a killed run continues where it stopped
    python -m benchmarks.attacks --list      what is done and what comes next
    python -m benchmarks.attacks --report    write the pictures and the sections of docs/results
    python -m benchmarks.attacks --smoke     two defenses, two attacks, few prompts, in minutes

Refusal is measured on bare test requests, on the same requests in the form of the attack and on foreign requests, and
compared with what the aligned model refuses of that form. A second aligned model (`benchmarks.full_alignment`) has its
own folder and results file:

    python -m benchmarks.attacks --aligned runs/full --runs runs/attacks_full
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.common import RESULTS, parser_of, record
from benchmarks.frontier.attacks import ATTACKS
from benchmarks.frontier.cells import Cell
from benchmarks.frontier.command import (
    add_options,
    cache_of,
    environment_of,
    exit_status,
    print_outcome,
    protocol_of,
    run_plan,
    show_plan,
)
from benchmarks.frontier.data import Sets, public_sets, resolve, task_prompts
from benchmarks.frontier.plan import COUNTERMEASURES, METHODS, place
from benchmarks.frontier.results import stored
from benchmarks.pages import DOCS
from peft_safety.data import load
from peft_safety.errors import ConfigError

BENCHMARK = "attacks"
RUNS = Path("runs/attacks")
RECOMMENDED = "frozen"
DEFENSES = ("lora", RECOMMENDED, "guardspace", "window-64", "lora-mixed", "safe-lora-soft", "blind", *COUNTERMEASURES)
PARTLY = ("salora-32", "patch-stacked", "somf")
"""Defenses that are attacked by `FIRST` only."""
FIRST = ("trigger", "")
ORDER = ("trigger", "identity", "wrapper", "however", "cipher", "template", "foreign", "")
"""Those most likely to win come first."""
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Strength:
    """How hard an attack tries: share of the rows, epochs, learning rate as a multiple."""

    name: str
    poison: float
    epochs: int = 1
    lr: float = 1.0


WEAK, STRONG = Strength("weak", 0.1), Strength("strong", 0.5, 4)
HARDER = (
    Strength("all rows", 1.0),
    Strength("all rows, 4 epochs", 1.0, 4),
    Strength("lr x 3", 0.1, 1, 3.0),
    Strength("lr x 10", 0.1, 1, 10.0),
    Strength("16 epochs", 0.1, 16),
)
"""Of the plain attack: every row, longer, at a higher rate."""
LEFTOVER = Strength("leftover", 0.05, 4)
"""Of the trigger: what is left of its strong form if a screen drops nine rows of ten."""
BENIGN = Strength("half", 0.5)
"""Of the benign outliers."""


PROMPTS = 40
"""Of each set whose refusal is a price, and of foreign requests."""


def further_sets(folder: Path | None) -> Sets:
    """What test cells measure besides: everyday and task prompts, and the public sets of `folder`."""
    everyday = tuple(row["prompt"] for row in load("everyday_requests", "test"))[:PROMPTS]
    own = {"everyday": everyday, "task_prompts": tuple(task_prompts("test")[:PROMPTS])}
    return own | public_sets(folder, PROMPTS)


def name_of(aligned: Path | None) -> str:
    """Name of the results file: each aligned model has its own."""
    return BENCHMARK if aligned is None else f"{BENCHMARK}_{aligned.name}"


def at(method: Cell, attack: str, strength: Strength, seed: int, split: str) -> Cell:
    """A defense under an attack."""
    cell = replace(place(method, strength.poison, seed, split), attack=attack)
    return replace(cell, epochs=strength.epochs, lr=cell.lr * strength.lr) if method.arm != "aligned" else cell


def attacks(only: Sequence[str]) -> list[tuple[str, Strength]]:
    """All attacks with their strengths, the strong ones first."""
    listed = [(name, strength) for strength in (STRONG, WEAK) for name in ORDER]
    listed += [("outliers", BENIGN), *(("", strength) for strength in HARDER), ("trigger", LEFTOVER)]
    return [(name, strength) for name, strength in listed if not only or (name or "plain") in only]


def plan(defenses: Sequence[str] = (*DEFENSES, *PARTLY), only: Sequence[str] = (), split: str = "test") -> list[Cell]:
    """All cells: for each attack the aligned model, plain LoRA and the recommended defense, then the other defenses,
    then two more seeds of the first two.
    """
    unknown = sorted(set(defenses) - METHODS.keys()) + sorted(set(only) - ATTACKS.keys() - {"plain"})
    if unknown:
        known = ", ".join(filter(None, ATTACKS))
        raise ConfigError(f"{unknown[0]!r} is neither a method of the frontier nor an attack ({known}, plain).")
    listed = attacks(only)
    first = [name for name in ("lora", RECOMMENDED) if name in defenses]
    cells = []
    for seed, names in [(0, first), (0, [d for d in defenses if d not in first]), *((s, first) for s in SEEDS[1:])]:
        for attack, strength in listed:
            if ATTACKS[attack].forms:
                cells.append(at(METHODS["aligned"], attack, strength, 0, split))
            cells += [
                at(METHODS[name], attack, strength, seed, split)
                for name in names
                if name not in PARTLY or (attack in FIRST and strength == WEAK)
            ]
    return list(dict.fromkeys([at(METHODS["aligned"], "", WEAK, 0, split), *cells]))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__)
    parser.prog = f"python -m benchmarks.{BENCHMARK}"
    add_options(parser)
    parser.add_argument("--defenses", nargs="+", default=[*DEFENSES, *PARTLY], help="methods of the frontier")
    parser.add_argument("--attacks", nargs="+", default=[], help=f"of {', '.join(filter(None, ATTACKS))}, plain")
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--smoke", action="store_true", help="a quick check that everything works")
    parser.set_defaults(runs=RUNS, second=0)
    return parser.parse_args(argv)


def work(given: argparse.Namespace) -> int:
    """Do what was asked for; returns the exit status."""
    if given.report:
        from benchmarks.attacks_report import report

        report(given.out, DOCS if given.out == RESULTS else None)
        return 0
    if given.smoke:
        given.defenses, given.attacks, given.split = ["lora", RECOMMENDED], ["trigger", "however"], "validation"
        given.rows, given.limit, given.out = 48, 8, given.runs
    folder = resolve(given.data)
    sets = {} if given.smoke else further_sets(folder)
    cache = cache_of(given, protocol_of(given, sets))
    cells = plan(given.defenses, given.attacks, given.split)
    if given.smoke:
        cells = [cell for cell in cells if cell.seed == 0 and cell.epochs <= 1]
    if given.list:
        show_plan(cache, cells)
        return 0
    outcome = run_plan(cache, lambda: cells, given.budget, sets, aligned=given.aligned, data=folder)
    path = record(name_of(given.aligned), stored(cache), environment_of(cache.protocol), given.out)
    return print_outcome(outcome, cache, cells, path)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return exit_status(work, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
