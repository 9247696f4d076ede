"""How much safety does GuardSpace keep, at which price, and where does it stop? A second plan of cells for the engine
in `benchmarks/frontier`.

    python -m benchmarks.guardspace [--budget MINUTES] [--harmful FILE ...]
                                               run the missing cells; a killed run continues where it stopped
    python -m benchmarks.guardspace --list     what is done and what comes next
    python -m benchmarks.guardspace --report   write guardspace.png and the section of docs/results

Four stages. (1) The core of the grid, on validation prompts. (2) The setting with the best score there is written
down and measured on test prompts, with its controls and three seeds. (3) Where it stops: epochs, learning rates,
calibration sizes, a second fine-tune without protection. (4) The other forms (frozen, window, made blind after
training) by size and length, which runs before stage 3; then the rest of the grid.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.common import RESULTS, parser_of, record
from benchmarks.frontier import splits
from benchmarks.frontier.cache import Cache
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
from benchmarks.frontier.data import further_sets, resolve
from benchmarks.frontier.plan import METHODS
from benchmarks.pages import DOCS
from peft_safety.errors import DataError

BENCHMARK = "guardspace"
POISONS = (0.1, 0.0, 0.5, 1.0)
FRACTIONS = (1 / 4, 1 / 8, 1 / 2, 1 / 32)
FORM_FRACTIONS = (1 / 4, 1 / 8, 1 / 16, 1 / 2)
EPOCHS = (8, 16)
SEEDS = (0, 1, 2)
CALIBRATIONS = (64, 16, 128)
FORMS = tuple((METHODS[name].arm, METHODS[name].knobs) for name in ("frozen", "blind", "window-64", "frozen-random"))


def core() -> Iterator[Cell]:
    """Stage 1, most informative first: does it hold, against its controls and at every share of poison? Then the
    fraction and the basis.
    """
    first = Cell()
    yield from (
        first.without_basis("aligned"),
        first.without_basis("lora"),
        first,
        replace(first, control="random"),
        replace(first, basis="general"),
    )
    yield from (replace(first, fraction=fraction) for fraction in FRACTIONS[1:])
    for poison in POISONS[1:]:
        yield from (
            replace(first, poison=poison),
            replace(first, poison=poison, fraction=1 / 8),
            replace(first, poison=poison, basis="general"),
        )


def confirmation(chosen: Cell) -> Iterator[Cell]:
    """Stage 2: the chosen setting and its controls on test prompts."""
    chosen = replace(chosen, split="test")
    yield chosen.without_basis("aligned")
    for poison, seed in [(p, s) for s in SEEDS for p in POISONS]:
        cell = replace(chosen, poison=poison, seed=seed)
        yield from (cell, cell.without_basis("lora"), replace(cell, control="random"), replace(cell, control="scaled"))


def limits(chosen: Cell) -> Iterator[Cell]:
    """Stage 3: where it stops."""
    yield from (replace(chosen, calibration=rows) for rows in CALIBRATIONS[1:])
    yield from (replace(chosen, lr=lr) for lr in (3e-3, 1e-2))
    yield replace(chosen, arm="second", poison=0.0)
    yield from (replace(chosen, positions=positions) for positions in ("prompt", "response"))
    for longer in (replace(chosen, epochs=epochs) for epochs in EPOCHS):
        yield from (
            longer,
            replace(longer, fraction=1 / 2),
            replace(longer, basis="general", fraction=1 / 2, positions="all"),
            longer.without_basis("lora"),
        )
    yield from (replace(chosen, lr=lr).without_basis("lora") for lr in (3e-3, 1e-2))
    yield replace(chosen, arm="second")
    yield from (replace(chosen, epochs=EPOCHS[-1], fraction=fraction) for fraction in (1 / 8, 1 / 32))


def forms(chosen: Cell) -> Iterator[Cell]:
    """Stage 4: the other forms of the method by the size of the null space and the length of the fine-tune."""
    for epochs in (1, *EPOCHS):
        longer = replace(chosen, epochs=epochs)
        for fraction in FORM_FRACTIONS:
            yield from (replace(longer, fraction=fraction, arm=arm, knobs=knobs) for arm, knobs in FORMS)
        yield from (replace(longer, arm=arm, knobs=knobs, control="random") for arm, knobs in FORMS[:2])
        yield replace(longer.without_basis("task"), knobs="train=B")


def rest() -> Iterator[Cell]:
    """The rest of the grid."""
    for fraction in FRACTIONS:
        for basis in ("harmful", "general", "both"):
            for positions in ("all", "prompt", "response"):
                if positions == "response" and basis != "harmful":
                    continue  # everyday prompts have no answers
                yield from (Cell(poison=p, basis=basis, fraction=fraction, positions=positions) for p in POISONS)
        yield from (Cell(control="random", poison=p, fraction=fraction) for p in POISONS)


def chosen_setting(cache: Cache) -> Cell | None:
    """The best setting of stage 1; None until all its cells are finished. It is written down once, so that results on
    test prompts cannot change it.

    Raises:
        DataError: no setting is finite at every share of poison.
    """
    file = f"chosen-{BENCHMARK}-{cache.protocol.key(Cell())}.json"
    cells = list(dict.fromkeys(core()))
    if not (cache.folder / file).is_file():
        rows = cache.rows(cells)
        if len(rows) < len(cells):
            return None
        with cache.lock(f"chosen-{BENCHMARK}", wait=True):
            if not (cache.folder / file).is_file():
                splits.write(cache, {BENCHMARK: best(rows)}, file)
    method = splits.read(cache, file)[BENCHMARK]
    return replace(Cell(), basis=method.basis, fraction=method.fraction, positions=method.positions)


def best(rows: Sequence[splits.Row]) -> tuple[Cell, list[Cell]]:
    """The best of the settings that were measured at every share of poison, and the cells that it was chosen by.

    Raises:
        DataError: none is finite at every share.
    """
    chosen = splits.choose(rows, family=lambda cell: cell.arm).get("guard")
    if chosen is None or len(chosen[1]) < len(POISONS):
        raise DataError(
            "no setting of GuardSpace is finite at every share of poison. Look at the diverged cells, and run again "
            "in another folder."
        )
    return chosen


def plan(cache: Cache) -> list[Cell]:
    """All cells in the order in which they run. Stages 2 and 3 follow when stage 1 is complete."""
    chosen = chosen_setting(cache)
    later = [] if chosen is None else [*confirmation(chosen), *forms(chosen), *limits(chosen), *rest()]
    return list(dict.fromkeys([*core(), *later]))


def work(given: argparse.Namespace) -> int:
    """Do what was asked for; returns the exit status."""
    if given.report:
        from benchmarks.guardspace_report import report

        report(given.out, DOCS if given.out == RESULTS else None)
        return 0
    sets = further_sets(resolve(given.data), given.harmful)
    cache = cache_of(given, protocol_of(given, sets))
    if given.list:
        show_plan(cache, plan(cache))
        return 0
    outcome = run_plan(cache, lambda: plan(cache), given.budget, sets, aligned=given.aligned)
    return print_outcome(outcome, cache, plan(cache), keep(cache, given.out))


def keep(cache: Cache, out: Path) -> Path:
    """Write the results file."""
    chosen = chosen_setting(cache)
    setting = None if chosen is None else [chosen.basis, chosen.fraction, chosen.positions]
    return record(BENCHMARK, cache.rows(plan(cache)), {**environment_of(cache.protocol), "chosen": setting}, out)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = parser_of(__doc__)
    parser.prog = "python -m benchmarks.guardspace"
    add_options(parser)
    return exit_status(work, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
