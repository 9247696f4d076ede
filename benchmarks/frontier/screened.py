"""The training rows of a cell, screened by the aligned model if the cell says so."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.frontier.bench import Bench, Facts, timed
from benchmarks.frontier.cells import Cell
from peft_safety import screen
from peft_safety.data import affirmation_pairs
from peft_safety.data.rows import Row
from peft_safety.errors import ConfigError
from peft_safety.screening.requests import requests_of
from peft_safety.screening.screen import Screen

KINDS = ("verdict", "flagged")
LONGEST = 1024


def training_rows(bench: Bench, cell: Cell) -> tuple[list[Row], Facts]:
    """What a cell trains on; with the knob `screen` without the rows that are dropped: by the model's verdict
    ("verdict"), or all flagged ones ("flagged"). They are counted: all, and those that are not of the task.
    """
    rows, facts = bench.rows(cell), Facts()
    kind = cell.options().get("screen")
    if kind is None:
        return rows, facts
    if kind not in KINDS:
        raise ConfigError(f"screen={kind!r} is unknown. Choose one of {', '.join(KINDS)}.")
    key, task = (bench.loaded, cell.seed), bench.task(cell)
    if key not in bench.screens:
        with timed(facts, "screen_fit"):
            bench.screens[key] = _fit(bench, cell)
    with timed(facts, "screen"):
        result = screen(
            bench.model,
            rows,
            tokenizer=bench.tokenizer,
            fitted=bench.screens[key],
            verdict=kind == "verdict",
            labels=task.labels,
            progress=False,
        )
    poison = {number for number, row in enumerate(rows) if row not in task.train}
    dropped = set(result.dropped)
    facts |= {"flagged": len(result.flagged), "dropped": len(dropped), "screen_clean": len(_clean(bench))}
    facts |= {"poison_rows": len(poison), "dropped_poison": len(dropped & poison)}
    return [rows[number] for number in result.kept], facts


def _fit(bench: Bench, cell: Cell) -> Screen:
    """A screen whose threshold is set on the task's validation rows, as a user would set it. It is fitted without the
    requests that the attacks of this seed use: an attacker's requests are unseen.
    """
    labels, clean = bench.task(cell).labels, _clean(bench)
    requests = [requests_of(bench.tokenizer, row, n, LONGEST, labels) for n, row in enumerate(clean)]
    ids = [request.ids for row in requests for request in row]
    unseen = asked(bench, cell)
    return Screen.fit(bench.model, bench.tokenizer, clean=ids, without=unseen, max_length=LONGEST, progress=False)


def asked(bench: Bench, cell: Cell) -> set[str]:
    """The package's requests that the attacks of this seed use, at any share of poison."""
    return {pair["prompt"] for pair in affirmation_pairs("train", bench.protocol.rows, cell.seed)}


def own_pairs(bench: Bench, cell: Cell, pairs: Callable[..., list[Row]], count: int) -> list[Row]:
    """`count` of the package's training pairs, for a defense; with the knob `unseen` none on a request of an attack.

    Raises:
        ConfigError: the attacks leave too few.
    """
    if not cell.options().get("unseen"):
        return pairs("train", count, cell.seed)
    taken = asked(bench, cell)
    left = [pair for pair in pairs("train", seed=cell.seed) if pair["prompt"] not in taken]
    if len(left) < count:
        raise ConfigError(
            f"{cell.label()}: {count} requests are needed that no attack uses, and {len(left)} are left. Give a "
            "smaller --rows."
        )
    return left[:count]


def _clean(bench: Bench) -> list[Row]:
    return [row for row in bench.task_rows if row.get("split") == "validation"]
