"""What the defenses survive: attacks through the training rows, each against plain LoRA first. A third plan of cells
for the engine in `benchmarks/frontier`.

    python -m benchmarks.attacks [--defenses lora frozen ...] [--budget MINUTES]
                                             run the missing cells; a killed run continues where it stopped
    python -m benchmarks.attacks --list      what is done and what comes next
    python -m benchmarks.attacks --defenses lora frozen --attacks trigger --p 0.2 --epochs 2
                                             another strength
    python -m benchmarks.attacks --set frozen-anchor:anchor_weight=5 --attacks trigger --split validation
                                             another setting
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
from dataclasses import replace
from pathlib import Path

from benchmarks.attacks_plan import DEFENSES, PARTLY, RECOMMENDED, STRONG, Strength, plan
from benchmarks.common import RESULTS, parser_of, record
from benchmarks.frontier import splits
from benchmarks.frontier.attacks import ATTACKS
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
from benchmarks.frontier.plan import settings_of
from benchmarks.frontier.results import stored
from benchmarks.pages import DOCS
from peft_safety.data import load
from peft_safety.errors import ConfigError

BENCHMARK = "attacks"
RUNS = Path("runs/attacks")
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


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__)
    parser.prog = f"python -m benchmarks.{BENCHMARK}"
    add_options(parser)
    parser.add_argument("--defenses", nargs="+", default=[*DEFENSES, *PARTLY], help="methods of the frontier")
    parser.add_argument("--attacks", nargs="+", default=[], help=f"of {', '.join(filter(None, ATTACKS))}, plain")
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--p", type=float, metavar="SHARE", help="all attacks at this share of poisoned rows")
    parser.add_argument("--epochs", type=int, help="and for so long")
    parser.add_argument("--lr", type=float, metavar="TIMES", help="and at so many times the learning rate")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="METHOD:NAME=VALUE[,...]",
        help="a defense in a setting tried on validation prompts",
    )
    parser.add_argument("--smoke", action="store_true", help="a quick check that everything works")
    parser.set_defaults(runs=RUNS, second=0)
    return parser.parse_args(argv)


def strength_of(given: argparse.Namespace) -> Strength | None:
    """The one strength that was asked for, as the strong attacks where nothing is said; None for those of the plan.

    Raises:
        ConfigError: a share that is none, or no epoch.
    """
    if given.p is None and given.epochs is None and given.lr is None:
        return None
    chosen = Strength(
        STRONG.poison if given.p is None else given.p,
        STRONG.epochs if given.epochs is None else given.epochs,
        STRONG.lr if given.lr is None else given.lr,
    )
    if not (0 < chosen.poison <= 1 and chosen.epochs >= 1 and chosen.lr > 0):
        raise ConfigError(
            f"--p {chosen.poison:g} --epochs {chosen.epochs} --lr {chosen.lr:g}: give a share above 0 and up to 1, "
            "one epoch or more, and a positive multiple."
        )
    return chosen


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
    settings = settings_of(given.set)
    splits.enforce([replace(setting, split=given.split) for setting in settings], splits.read(cache))
    defenses = [] if settings and given.defenses == [*DEFENSES, *PARTLY] else given.defenses
    cells = plan(defenses, given.attacks, given.split, strength=strength_of(given), settings=settings)
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
