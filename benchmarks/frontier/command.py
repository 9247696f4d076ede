"""What the commands of the frontier and of the GuardSpace benchmark share: options, the run, and what they print."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS
from benchmarks.frontier import data
from benchmarks.frontier.cache import Cache
from benchmarks.frontier.cells import PATCH, SECOND, Cell, Protocol, needs
from benchmarks.frontier.plan import name_of
from benchmarks.frontier.results import adopt
from benchmarks.frontier.run import Outcome, run
from peft_safety.core.environment import environment
from peft_safety.errors import PeftSafetyError

RUNS = Path("runs/frontier")
"""Both benchmarks use this folder, so that a cell of both plans runs once."""


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """The options of every command that runs a plan of cells."""
    parser.add_argument("--budget", type=float, default=float("inf"), help="minutes; the run stops between two cells")
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder of the finished cells")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results file and the pictures")
    parser.add_argument("--rows", type=int, default=Protocol.rows, help="number of training rows of the task")
    parser.add_argument("--limit", type=int, default=Protocol.limit, help="largest number of prompts of each kind")
    parser.add_argument("--list", action="store_true", help="print the plan and which cells are finished")
    parser.add_argument("--report", action="store_true", help="write the report from the results; run nothing")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of the commands that fine-tune on the task of the package."""
    add_run_options(parser)
    parser.add_argument(
        "--aligned",
        type=Path,
        help="directory of the aligned model; default: the model with the patch of benchmarks/data/patch",
    )
    parser.add_argument(
        "--data",
        help="directory, or hub:owner/name, of advbench.jsonl and xstest.jsonl; "
        "default: ../shared/data if it exists, else none",
    )
    parser.add_argument(
        "--harmful", type=Path, nargs="*", default=[], help="JSON lines {prompt}: more harmful prompts for test cells"
    )
    parser.add_argument("--adopt", type=Path, metavar="FILE", help="a results file whose cells count as finished")
    parser.set_defaults(model=None, second=SECOND, judge=[])


def protocol_of(
    given: argparse.Namespace, sets: data.Sets, task: Sequence[Mapping[str, Any]] | None = None
) -> Protocol:
    """What all cells of one call share."""
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


def cache_of(given: argparse.Namespace, protocol: Protocol) -> Cache:
    """The folder of the finished cells, with those of `--adopt`."""
    cache = Cache(given.runs, protocol)
    if given.adopt is not None:
        print(f"took {adopt(cache, given.adopt)} cells from {given.adopt}")
    return cache


def show_plan(cache: Cache, cells: Sequence[Cell]) -> None:
    """Print every cell of a plan, and whether it is finished."""
    for cell in cells:
        state, place = "done" if cache.get(cell) else "    ", f"p={cell.poison:g} seed={cell.seed} {cell.split}"
        print(state, cache.protocol.key(cell), *filter(None, (name_of(cell), cell.attack)), place)


def run_plan(
    cache: Cache, plan: Callable[[], Sequence[Cell]], budget: float, sets: data.Sets, **of_bench: Any
) -> Outcome:
    """Run the missing cells of a plan. The model is loaded when the first of them starts; see `Bench` for `of_bench`
    and `run` for the rest.
    """
    from benchmarks.frontier.arms import run_cell
    from benchmarks.frontier.bench import Bench

    benches: list[Bench] = []

    def work(cell: Cell) -> dict[str, Any]:
        if not benches:
            benches.append(Bench(cache, sets, **of_bench))
        return run_cell(benches[0], cell)

    return run(cache, plan, work, budget, needs)


def environment_of(protocol: Protocol) -> dict[str, Any]:
    """What the figures depend on."""
    import torch

    facts = {name: value for name, value in asdict(protocol).items() if name != "aligned"}
    return environment(0, model=protocol.aligned, threads=torch.get_num_threads(), **facts)


def print_outcome(outcome: Outcome, cache: Cache, cells: Sequence[Cell], path: Path | None = None) -> int:
    """Print what was done and what failed; returns the exit status."""
    if path is not None:
        print(
            f"{outcome.done} cells run ({outcome.diverged} diverged), {len(cache.rows(cells))} of {len(cells)} done; "
            f"results in {path}. Render with --report."
        )
    for cell, error in outcome.failed.items():
        print(f"failed: {cell.label()}: {error}", file=sys.stderr)
    return 1 if outcome.failed else 0


def exit_status(work: Callable[[argparse.Namespace], int], given: argparse.Namespace) -> int:
    """Do the work; an error of the package is printed as one line."""
    try:
        return work(given)
    except PeftSafetyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
