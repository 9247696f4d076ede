"""The safety-utility frontier: every method and every control, on a real model, one cached cell at a time.

    python -m benchmarks.frontier [--methods all] [--p 0,0.1,0.5,1] [--seeds 0,1,2] [--budget MINUTES]
    python -m benchmarks.frontier --list      what is done and what comes next
    python -m benchmarks.frontier --report    pictures, frontier.html and the table in docs/results.md
    python -m benchmarks.frontier --smoke     a few cells in minutes, and whether they show what they must

The first runs what is missing; a killed run resumes.
Settings are tried with --split validation --set METHOD:NAME=VALUE and fixed with --choose; on test prompts only those
or the documented defaults run. Several processes may share one folder.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.common import RESULTS
from benchmarks.frontier import data, plan, splits
from benchmarks.frontier.cache import Cache
from benchmarks.frontier.cells import PATCH, SECOND, Cell, Protocol, needs
from benchmarks.frontier.results import adopt, keep, stored
from benchmarks.frontier.run import Outcome, run
from peft_safety.errors import ConfigError, PeftSafetyError

RUNS = Path("runs/frontier")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.frontier", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", help="hub id or directory of an instruct model that is not aligned; default SmolLM2-135M-Instruct"
    )
    parser.add_argument(
        "--aligned", type=Path, help="directory of its aligned form; default: --model with a safety patch, made once"
    )
    parser.add_argument("--methods", nargs="+", default=["all"], help=f"names or groups ({', '.join(plan.GROUPS)})")
    parser.add_argument("--p", default="0,0.1,0.5,1", help="shares of the training rows that are a simulated attack")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--budget", type=float, default=float("inf"), help="minutes; stops between two cells")
    parser.add_argument(
        "--data",
        help="directory, or hub:owner/name, of advbench.jsonl and xstest.jsonl; "
        "default ../shared/data where it is, else none",
    )
    parser.add_argument(
        "--harmful",
        type=Path,
        nargs="*",
        default=[],
        help="JSON lines of {prompt} rows: further harmful prompts, for transfer",
    )
    parser.add_argument(
        "--task", choices=("help-desk", "banking"), default="help-desk", help="the trained task; banking needs --data"
    )
    parser.add_argument(
        "--judge", action="append", default=[], help="model id or directory of a classifier that also judges"
    )
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="METHOD:NAME=VALUE[,...]",
        help="one more setting, on validation prompts",
    )
    parser.add_argument("--choose", action="store_true", help="fix the best settings of the validation cells")
    parser.add_argument("--runs", type=Path, default=RUNS, help="where finished cells are kept")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where results and pictures go")
    parser.add_argument("--rows", type=int, default=Protocol.rows, help="of the task, to train on")
    parser.add_argument("--limit", type=int, default=Protocol.limit, help="prompts and task rows of each kind at most")
    parser.add_argument("--second", type=int, default=SECOND, help="rows of the untrained task")
    parser.add_argument(
        "--adopt",
        type=Path,
        metavar="FILE",
        help="a results file (results/frontier.jsonl) whose cells count as finished here",
    )
    parser.add_argument("--list", action="store_true", help="print the plan and what of it is done")
    parser.add_argument("--report", action="store_true", help="render the results instead of running")
    parser.add_argument("--smoke", action="store_true")
    return parser.parse_args(argv)


def numbers(text: str, kind: type[int] | type[float]) -> list[float]:
    """`0,0.1` as numbers.

    Raises:
        ConfigError: something else.
    """
    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"{text!r} is no list of numbers. Write them with commas between: 0,0.1,1.") from error
    if kind is float and not all(0 <= value <= 1 for value in found):
        raise ConfigError(f"--p {text}: a share of poisoned rows lies between 0 and 1.")
    return found


def methods_of(given: argparse.Namespace, chosen: dict[str, Cell]) -> list[Cell]:
    """The methods asked for, in the settings asked for."""
    settings = []
    for text in given.set:
        name, colon, setting = text.partition(":")
        if ":" in setting:  # a control's name has a colon of its own
            rest, _, setting = setting.partition(":")
            name = f"{name}:{rest}"
        if not colon:
            raise ConfigError(f"--set {text!r}: write METHOD:NAME=VALUE, for example guardspace:fraction=0.5.")
        settings.append(plan.with_setting(plan.METHODS[plan.named([name])[0]], setting))
    named = [] if settings and given.methods == ["all"] else plan.named(given.methods)
    found = [plan.METHODS[name] for name in named] + settings
    if given.split == "test":
        for name, method in chosen.items():
            found += [
                replace(method, control=control)
                for control in ("", "random", "scaled")
                if _wanted(name, control, named)
            ]
    return list(dict.fromkeys(found))


def _wanted(name: str, control: str, named: Sequence[str]) -> bool:
    return (f"{control}:{name}" if control else name) in named


def main(argv: Sequence[str] | None = None) -> int:
    given = parse(argv)
    try:
        return work(given)
    except PeftSafetyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def work(given: argparse.Namespace) -> int:
    """Do what was asked for; the exit status."""
    if given.smoke:
        from benchmarks.frontier.smoke import smoke, version

        return smoke(given.runs / f"smoke-{version()}" if given.runs == RUNS else given.runs)
    if given.report:
        from benchmarks.frontier.report import PAGE, report

        report(given.out, PAGE if given.out == RESULTS else None)
        return 0
    folder = data.resolve(given.data)
    sets, task = data.further_sets(folder, given.harmful), None
    if given.task == "banking":
        if folder is None:
            raise ConfigError("--task banking needs --data, the directory of its files.")
        task = data.banking(folder)
    if given.judge:
        from peft_safety.evaluation.classifier import ClassifierJudge

        judges = [ClassifierJudge(name) for name in given.judge]
    else:
        judges = []
    cache = Cache(given.runs, protocol_of(given, sets, task))
    if given.adopt is not None:
        print(f"took {adopt(cache, given.adopt)} cells from {given.adopt}")
    chosen = splits.read(cache)
    cells = plan.plan(
        methods_of(given, chosen),
        numbers(given.p, float),
        [int(seed) for seed in numbers(given.seeds, int)],
        given.split,
    )
    splits.enforce(cells, chosen)
    if given.choose:
        print(f"wrote {splits.write(cache, stored(cache))}")
        return 0
    if given.list:
        for cell in cells:
            print(
                "done" if cache.get(cell) else "    ",
                cache.protocol.key(cell),
                plan.name_of(cell),
                f"p={cell.poison:g} seed={cell.seed} {cell.split}",
            )
        return 0
    from benchmarks.frontier.bench import Bench, environment_of

    unaligned = Path(given.model) if given.model else None
    benches: list[Bench] = []

    def one(cell: Cell) -> dict[str, object]:
        if not benches:  # loading the model can wait until a cell is ours
            benches.append(Bench(cache, sets, given.aligned, unaligned=unaligned, judges=judges, task=task))
        return benches[0].cell(cell)

    outcome = run(cache, lambda: cells, one, given.budget, needs)
    facts = {name: plan.difference(plan.METHODS[name], method) or "default" for name, method in chosen.items()}
    path = keep(cache, {**environment_of(cache.protocol), "chosen": facts}, given.out)
    return said(outcome, cache, cells, path)


def protocol_of(given: argparse.Namespace, sets: data.Sets, task: list[dict[str, object]] | None) -> Protocol:
    """What the cells of this call share."""
    unaligned = Path(given.model).name if given.model else "SmolLM2-135M-Instruct"
    made = given.aligned is None or given.aligned.name == "aligned"
    return Protocol(
        rows=given.rows,
        limit=given.limit,
        aligned=f"{unaligned}, patched" if made else given.aligned.name,
        patch=PATCH if made else "",
        sets=data.hashes(sets),
        second=given.second,
        task="" if task is None else data.task_fingerprint(task),
        judges=",".join(sorted(given.judge)),
    )


def said(outcome: Outcome, cache: Cache, cells: Sequence[Cell], path: Path) -> int:
    """Say what happened; the exit status."""
    done = len(cache.rows(cells))
    print(
        f"{outcome.done} cells run ({outcome.diverged} diverged), {done} of {len(cells)} done; results in {path}. "
        "Render with --report."
    )
    for cell, error in outcome.failed.items():
        print(f"failed: {cell.label()}: {error}", file=sys.stderr)
    return 1 if outcome.failed else 0


if __name__ == "__main__":
    sys.exit(main())
