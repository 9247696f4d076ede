"""How much safety does GuardSpace keep, at what price, and where does it stop? On a real model, one cached cell at a
time.

    python -m benchmarks.guardspace [--budget MINUTES] [--harmful FILE ...]
    python -m benchmarks.guardspace --list      what is done and what would come next
    python -m benchmarks.guardspace --report    the table in docs/results.md, docs/guardspace.md and its picture

The first runs what is missing, most informative cells first; a killed run resumes.
A cell is one fine-tune of the aligned model and one measurement, one JSON file under runs/frontier named by a hash of
the cell and of the protocol. Three
stages: (1) the core of the grid, on validation prompts; (2) the setting with the best score there, fixed then and
written down, on test prompts with its controls and three seeds; (3) where it breaks: epochs, learning rates,
calibration sizes, a second fine-tune without protection; and the rest of the grid.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.common import record
from benchmarks.frontier import run as engine
from benchmarks.frontier.cache import Cache as Finished
from benchmarks.frontier.cells import PATCH, SECOND, Cell, Protocol, cell_of, needs
from benchmarks.frontier.data import further_sets, hashes, resolve
from benchmarks.frontier.splits import score

POISONS = (0.1, 0.0, 0.5, 1.0)
FRACTIONS = (1 / 4, 1 / 8, 1 / 2, 1 / 32)
EPOCHS = (8, 16)
SEEDS = (0, 1, 2)
CALIBRATIONS = (64, 16, 128)
RUNS = Path("runs/frontier")
"""Shared with `benchmarks.frontier`: cells that both plan run once."""


def core() -> Iterator[Cell]:
    """Stage 1, most informative first: does it hold, against its controls and at every share of poison; then k and the
    basis.
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


def rest() -> Iterator[Cell]:
    """Everything else of the grid."""
    for fraction in FRACTIONS:
        for basis in ("harmful", "general", "both"):
            for positions in ("all", "prompt", "response"):
                if positions == "response" and basis != "harmful":
                    continue  # everyday prompts come without answers
                yield from (Cell(poison=p, basis=basis, fraction=fraction, positions=positions) for p in POISONS)
        yield from (Cell(control="random", poison=p, fraction=fraction) for p in POISONS)


def confirmation(setting: Sequence[Any]) -> Iterator[Cell]:
    """Stage 2: the chosen setting and its controls on test prompts."""
    chosen = replace(Cell(), basis=setting[0], fraction=setting[1], positions=setting[2], split="test")
    yield chosen.without_basis("aligned")
    for poison, seed in [(p, s) for s in SEEDS for p in POISONS]:
        cell = replace(chosen, poison=poison, seed=seed)
        yield from (cell, cell.without_basis("lora"), replace(cell, control="random"), replace(cell, control="scaled"))


def limits(setting: Sequence[Any]) -> Iterator[Cell]:
    """Stage 3: where it stops."""
    chosen = replace(Cell(), basis=setting[0], fraction=setting[1], positions=setting[2])
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


def choose(done: Sequence[dict[str, Any]]) -> tuple[str, float, str] | None:
    """The best setting among those measured at every share of poison on validation prompts; None while there is
    none.
    """
    found: dict[tuple[str, float, str], dict[float, dict[str, Any]]] = {}
    for row in done:
        cell = cell_of(row)
        if (
            "diverged" not in row
            and replace(cell, poison=0.1, basis="harmful", fraction=1 / 4, positions="all") == Cell()
        ):
            found.setdefault(cell.setting, {})[cell.poison] = row
    whole = {setting: list(rows.values()) for setting, rows in found.items() if set(rows) == set(POISONS)}
    return max(whole, key=lambda setting: score(whole[setting])) if whole else None


class Cache(Finished):
    """Finished cells, and the setting chosen from them."""

    def setting(self) -> tuple[str, float, str] | None:
        """The chosen setting, once stage 1 is complete. Written down it stays, so that test prompts are never chosen
        by.
        """
        path = self.folder / f"chosen-{self.protocol.key(Cell())}.json"
        if not path.is_file():
            cells = dict.fromkeys(core())
            found = self.rows(list(cells))
            if len(found) < len(cells):
                return None
            path.write_text(json.dumps(choose(found)))
        basis, fraction, positions = json.loads(path.read_text())
        return basis, fraction, positions

    def plan(self) -> list[Cell]:
        """All cells in the order they run: stage 1, and once it is complete the chosen setting's stages, and the rest
        of the grid.
        """
        setting = self.setting()
        later = [] if setting is None else [*confirmation(setting), *limits(setting), *rest()]
        return list(dict.fromkeys([*core(), *later]))


def run(cache: Cache, work: Callable[[Cell], dict[str, Any]], budget: float) -> int:
    """Run what is missing until the plan or the budget (minutes) is exhausted; never stops inside a cell. Returns how
    many cells were run.

    Raises:
        RuntimeError: cells that failed, by name; the others have run.
    """
    outcome = engine.run(cache, cache.plan, work, budget, needs)
    if outcome.failed:
        raise RuntimeError("; ".join(f"{cell.label()}: {error}" for cell, error in outcome.failed.items()))
    return outcome.done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=float("inf"), help="minutes; stops between two cells")
    parser.add_argument(
        "--harmful",
        type=Path,
        nargs="*",
        default=[],
        help="JSON lines of {prompt} rows: further harmful prompts, for transfer",
    )
    parser.add_argument(
        "--aligned",
        type=Path,
        help="directory of a chat model that refuses; default: SmolLM2-135M-Instruct with a safety patch, made once",
    )
    parser.add_argument("--runs", type=Path, default=RUNS, help="where finished cells are kept")
    parser.add_argument("--rows", type=int, default=Protocol.rows)
    parser.add_argument("--limit", type=int, default=Protocol.limit)
    parser.add_argument("--list", action="store_true", help="print the plan and what of it is done")
    parser.add_argument("--report", action="store_true", help="render the results instead of running")
    given = parser.parse_args()
    if given.report:
        from benchmarks.guardspace_report import report

        report()
        return
    sets = further_sets(resolve(None), given.harmful)
    aligned, patch = (given.aligned.name, "") if given.aligned else (Protocol.aligned, PATCH)
    protocol = Protocol(given.rows, given.limit, aligned, sets=hashes(sets), second=SECOND, patch=patch)
    cache = Cache(given.runs, protocol)
    if given.list:
        for cell in cache.plan():
            print("done " if cache.get(cell) else "     ", json.dumps(asdict(cell)))
        return
    from benchmarks.frontier.bench import Bench, environment_of

    bench = Bench(cache, sets, given.aligned)
    count = run(cache, bench.cell, given.budget)
    rows = cache.rows(cache.plan())
    path = record("guardspace", rows, {**environment_of(protocol), "chosen": cache.setting()})
    print(f"{count} cells run, {len(rows)} of {len(cache.plan())} done; written to {path}. Render with --report.")


if __name__ == "__main__":
    main()
