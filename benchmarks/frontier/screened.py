"""The training rows of a cell, screened by the aligned model if the cell says so."""

from __future__ import annotations

from benchmarks.frontier.bench import Bench, Facts, timed
from benchmarks.frontier.cells import Cell
from peft_safety import screen
from peft_safety.data.rows import Row


def training_rows(bench: Bench, cell: Cell) -> tuple[list[Row], Facts]:
    """What a cell trains on; with the knob `screen=1` without the rows that the screen drops. They are counted: all,
    and those that are not of the task.
    """
    rows, facts = bench.rows(cell), Facts()
    if not cell.options().get("screen"):
        return rows, facts
    labels = bench.task(cell).labels
    clean = [row for row in bench.task_rows if row.get("split") == "validation"]
    if bench.loaded not in bench.screens:  # the threshold is set on the task's validation rows, as a user would
        with timed(facts, "screen_fit"):
            first = screen(
                bench.model, clean[:1], tokenizer=bench.tokenizer, clean=clean, labels=labels, progress=False
            )
        bench.screens[bench.loaded] = first.screen
    with timed(facts, "screen"):
        fitted = bench.screens[bench.loaded]
        result = screen(
            bench.model, rows, tokenizer=bench.tokenizer, fitted=fitted, labels=labels, verdict=True, progress=False
        )
    benign = bench.task(cell).train
    poison = {number for number, row in enumerate(rows) if row not in benign}
    dropped = set(result.dropped)
    facts |= {"screen_clean": len(clean), "flagged": len(result.flagged), "dropped": len(dropped)}
    facts |= {"poison_rows": len(poison), "dropped_poison": len(dropped & poison)}
    return [rows[number] for number in result.kept], facts
