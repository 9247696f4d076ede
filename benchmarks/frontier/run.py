"""Runs the missing cells of a plan in order. Several processes can do so at the same time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.frontier.cache import POLL, Cache
from benchmarks.frontier.cells import Cell
from peft_safety.errors import ArtifactError, DivergedError

Work = Callable[[Cell], dict[str, Any]]


@dataclass
class Outcome:
    """The outcome of one call.

    Attributes:
        done: number of cells that it ran.
        diverged: how many of them ended in numbers that are not finite; they are recorded as diverged.
        failed: the error of each cell that failed. They are not recorded and run again next time.
    """

    done: int = 0
    diverged: int = 0
    failed: dict[Cell, str] = field(default_factory=dict)


def run(
    cache: Cache,
    plan: Callable[[], Sequence[Cell]],
    work: Work,
    budget: float = float("inf"),
    needs: Callable[[Cell], Sequence[Cell]] = lambda cell: (),
) -> Outcome:
    """Run the missing cells until the plan is complete or the budget is spent. It never stops inside a cell.

    It leaves out a cell that another process works on, and a cell that needs others waits for them. A cell that fails
    does not stop the others.

    Args:
        plan: gives all cells. It is called again after every pass, since results can change the plan.
        work: runs one cell.
        budget: in minutes.
        needs: gives the cells whose results a cell reads.

    Raises:
        ArtifactError: a result cannot be written, or one on disk is damaged.
    """
    from tqdm.auto import tqdm

    started, outcome = time.monotonic(), Outcome()
    while missing := [cell for cell in plan() if cell not in outcome.failed and cache.get(cell) is None]:
        total, before = len(plan()), outcome.done
        with tqdm(
            total=total, initial=total - len(missing) - len(outcome.failed), desc="cells", unit="cell", bar_format=BAR
        ) as bar:
            for index, cell in enumerate(missing):
                if time.monotonic() - started >= 60 * budget:
                    return outcome
                if any(cache.get(other) is None for other in needs(cell)):
                    continue
                bar.set_postfix_str(f"{cell.label()}; {_left(cache, plan(), missing[index:])}")
                _one(cache, cell, work, outcome)
                bar.update()
        if outcome.done == before and not _hopeful(cache, missing, outcome, needs):
            return outcome
        if outcome.done == before:
            time.sleep(POLL)  # others are at work on the rest
    return outcome


BAR = "{desc}: {n_fmt}/{total_fmt} |{bar:20}| {postfix}"


def _one(cache: Cache, cell: Cell, work: Work, outcome: Outcome) -> None:
    with cache.lock(cache.protocol.key(cell)) as mine:
        if not mine or cache.get(cell) is not None:
            return
        before = time.monotonic()
        try:
            result = work(cell)
        except DivergedError as error:
            result = {"diverged": str(error)}
            outcome.diverged += 1
        except ArtifactError:
            raise
        except (ValueError, RuntimeError, OSError) as error:
            outcome.failed[cell] = f"{type(error).__name__}: {error}"
            return
        cache.put(cell, {**result, "seconds": round(time.monotonic() - before, 1)})
        outcome.done += 1


def _hopeful(cache: Cache, missing: Sequence[Cell], outcome: Outcome, needs: Callable[[Cell], Sequence[Cell]]) -> bool:
    """Fail the cells whose needs will never be there; returns whether other processes still work on the rest."""
    waiting = {cell for cell in missing if cell not in outcome.failed and cache.get(cell) is None}
    for cell in list(waiting):
        absent = [
            other
            for other in needs(cell)
            if other not in waiting and cache.get(other) is None and not _busy(cache, other)
        ]
        if absent:
            outcome.failed[cell] = f"needs the cell {absent[0].label()!r}, which is not in the plan, or failed"
            waiting.discard(cell)
    return bool(waiting)


def _busy(cache: Cache, cell: Cell) -> bool:
    with cache.lock(cache.protocol.key(cell)) as free:
        return not free


def _left(cache: Cache, plan: Sequence[Cell], missing: Sequence[Cell]) -> str:
    """The time left, estimated from finished cells of the same arm."""
    seconds: dict[tuple[str, str, str], list[float]] = {}
    for row in cache.rows(plan):
        cell = row["cell"]
        seconds.setdefault((cell["arm"], cell.get("load", ""), cell["split"]), []).append(row.get("seconds", 0.0))
    every = [value for values in seconds.values() for value in values]
    if not every:
        return "time left unknown"
    usual = statistics.median(every)
    total = sum(statistics.median(seconds.get((cell.arm, cell.load, cell.split), [usual])) for cell in missing)
    return f"about {total / 3600:.1f} h left" if total >= 5400 else f"about {max(1, round(total / 60))} min left"
