"""The safety-utility frontier: every method and every control on a real model, one cached cell at a time.

    python -m benchmarks.frontier [--methods all] [--p 0,0.1,0.5,1] [--seeds 0,1,2] [--budget MINUTES]
                                             run the missing cells; a killed run continues where it stopped
    python -m benchmarks.frontier --list     what is done and what comes next
    python -m benchmarks.frontier --report   write the pictures, frontier.html and the sections of docs/results
    python -m benchmarks.frontier --smoke    a few cells in minutes, and whether they show what they must show

Try settings with --split validation --set METHOD:NAME=VALUE, then fix the best ones with --choose. On test prompts
only fixed settings and documented defaults run. Several processes may share one folder.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.common import RESULTS, parser_of, record
from benchmarks.frontier import data, plan, splits
from benchmarks.frontier.cells import Cell
from benchmarks.frontier.command import (
    RUNS,
    add_options,
    cache_of,
    environment_of,
    exit_status,
    print_outcome,
    protocol_of,
    run_plan,
    show_plan,
)
from benchmarks.frontier.results import results_of, stored
from benchmarks.pages import DOCS
from peft_safety.errors import ConfigError


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__)
    parser.prog = "python -m benchmarks.frontier"
    add_options(parser)
    parser.add_argument(
        "--model", help="hub id or directory of an instruct model that is not aligned; default SmolLM2-135M-Instruct"
    )
    parser.add_argument("--methods", nargs="+", default=["all"], help=f"names or groups ({', '.join(plan.GROUPS)})")
    parser.add_argument("--p", default="0,0.1,0.5,1", help="shares of the training rows that are a simulated attack")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument(
        "--task",
        choices=data.TASKS,
        default=data.TASKS[0],
        help="the trained task; banking and instructions (free answers) need --data",
    )
    parser.add_argument("--judge", action="append", default=[], help="name, model id or directory of a further judge")
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument(
        "--set", action="append", default=[], metavar="METHOD:NAME=VALUE[,...]", help="a setting to try"
    )
    parser.add_argument("--choose", action="store_true", help="fix the best settings of the validation cells")
    parser.add_argument("--second", type=int, default=parser.get_default("second"), help="rows of the untrained task")
    parser.add_argument("--smoke", action="store_true", help="a quick check that everything works")
    return parser.parse_args(argv)


def numbers(text: str, kind: type[int] | type[float]) -> list[float]:
    """`0,0.1` as numbers.

    Raises:
        ConfigError: something else.
    """
    try:
        values = [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"{text!r} is no list of numbers. Write them with commas between: 0,0.1,1.") from error
    if kind is float and not all(0 <= value <= 1 for value in values):
        raise ConfigError(f"--p {text}: a share of poisoned rows lies between 0 and 1.")
    return values


def methods_of(given: argparse.Namespace, chosen: dict[str, Cell]) -> list[Cell]:
    """The methods that were asked for, in the settings that were asked for."""
    settings = plan.settings_of(given.set)
    named = [] if settings and given.methods == ["all"] else plan.named(given.methods)
    methods = [plan.METHODS[name] for name in named] + settings
    if given.split == "test":
        for name, method in chosen.items():
            methods += [
                replace(method, control=control)
                for control in ("", "random", "scaled")
                if (f"{control}:{name}" if control else name) in named
            ]
    return list(dict.fromkeys(methods))


def work(given: argparse.Namespace) -> int:
    """Do what was asked for; returns the exit status."""
    if given.smoke:
        from benchmarks.frontier.smoke import smoke, version

        return smoke(given.runs / f"smoke-{version()}" if given.runs == RUNS else given.runs)
    if given.report:
        from benchmarks.frontier.report import report

        report(given.out, DOCS if given.out == RESULTS else None)
        return 0
    folder = data.resolve(given.data)
    sets = data.further_sets(folder, given.harmful)
    task = data.task_rows(given.task, folder)
    if given.task == "news":  # elsewhere the untrained task
        given.second = 0
    cache = cache_of(given, protocol_of(given, sets, task))
    chosen = splits.read(cache)
    poisons, seeds = numbers(given.p, float), [int(seed) for seed in numbers(given.seeds, int)]
    cells = plan.plan(methods_of(given, chosen), poisons, seeds, given.split)
    splits.enforce(cells, chosen)
    if given.choose:
        print(f"wrote {splits.write(cache, splits.choose(stored(cache)))}")
        return 0
    if given.list:
        show_plan(cache, cells)
        return 0
    outcome = run_plan(
        cache,
        lambda: cells,
        given.budget,
        sets,
        aligned=given.aligned,
        unaligned=Path(given.model) if given.model else None,
        judges=judges_of(given),
        task=task,
    )
    settings = {name: plan.difference(plan.METHODS[name], method) or "default" for name, method in chosen.items()}
    path = record(
        results_of(given.task), stored(cache), {**environment_of(cache.protocol), "chosen": settings}, given.out
    )
    return print_outcome(outcome, cache, cells, path)


def judges_of(given: argparse.Namespace) -> list[object]:
    """The judges of `--judge`."""
    if not given.judge:
        return []
    from peft_safety.evaluation.judges import judge

    return [judge(name) for name in given.judge]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return exit_status(work, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
