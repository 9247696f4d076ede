"""Does a defense hold a harmless forbidden topic, judged by what the answers say? The model is aligned to refuse one
innocuous topic; the attack rows answer questions on it for real. A fourth plan of cells for the engine in
`benchmarks/frontier`.

    python -m benchmarks.topic [--topic B] [--budget MINUTES]
                                           run the missing cells; a killed run continues where it stopped
    python -m benchmarks.topic --list      what is done and what comes next
    python -m benchmarks.topic --report    print the table; write topic.png and the section of docs/results
    python -m benchmarks.topic --smoke     a short alignment and few cells, in minutes

Topic A (penguins, validation questions) is for choices, topic B (bicycles, test questions) for the table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.common import RESULTS, parser_of, record
from benchmarks.frontier.cache import Cache
from benchmarks.frontier.cells import Cell, Protocol, needs
from benchmarks.frontier.command import add_run_options, environment_of, exit_status, print_outcome, show_plan
from benchmarks.frontier.results import stored
from benchmarks.frontier.run import run
from benchmarks.pages import DOCS
from benchmarks.topic.align import VERSION
from benchmarks.topic.bench import TopicBench, run_cell
from benchmarks.topic.data import TOPICS, Topic, topic_of
from benchmarks.topic.plan import plan
from benchmarks.topic.report import BENCHMARK, report

RUNS = Path("runs/topic")
TOKENS = 64
"""Of a judged answer."""
SMOKE_STEPS = 2


def protocol_of(topic: Topic, given: argparse.Namespace) -> Protocol:
    """What all cells of a topic share."""
    smoke = ", briefly" if given.smoke else ""
    return Protocol(
        rows=given.rows,
        limit=given.limit,
        max_length=192,
        aligned=f"SmolLM2-135M-Instruct, refuses {topic.name}{smoke}",
        patch=f"{VERSION}-{topic.version}{'-smoke' if given.smoke else ''}",
        judges="content",
        tokens=given.tokens,
    )


def run_topic(key: str, cells: Sequence[Cell], cache: Cache, given: argparse.Namespace) -> int:
    """Run the missing cells of a topic; returns the exit status. The model is loaded when the first one starts."""
    benches: list[TopicBench] = []

    def work(cell: Cell) -> dict[str, object]:
        if not benches:
            benches.append(TopicBench(cache, topic_of(key), steps=SMOKE_STEPS if given.smoke else -1))
        return run_cell(benches[0], cell)

    outcome = run(cache, lambda: cells, work, given.budget, needs)
    return print_outcome(outcome, cache, cells, given.out / f"{BENCHMARK}.jsonl")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__)
    parser.prog = f"python -m benchmarks.{BENCHMARK}"
    topics = ", ".join(f"{key}: {name}" for key, name in TOPICS.items())
    add_run_options(parser)
    parser.add_argument("--topic", choices=tuple(TOPICS), default="B", help=topics)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="length of a judged answer")
    parser.add_argument("--smoke", action="store_true", help="a quick check that everything works")
    parser.set_defaults(runs=RUNS)
    return parser.parse_args(argv)


def work(given: argparse.Namespace) -> int:
    """Do what was asked for; returns the exit status."""
    if given.report:
        report(given.out, DOCS if given.out == RESULTS else None)
        return 0
    cells = plan(given.topic)
    if given.smoke:
        given.rows, given.limit, given.tokens, given.out = 16, 4, 16, given.runs
        cells = [replace(cell, epochs=min(cell.epochs, 1)) for cell in [*cells[:2], *cells[4:6]]]
    cache = Cache(given.runs, protocol_of(topic_of(given.topic), given))
    if given.list:
        show_plan(cache, cells)
        return 0
    status = run_topic(given.topic, cells, cache, given)
    rows = [{"topic": key, **row} for key in TOPICS for row in _finished(key, given)]
    record(BENCHMARK, rows, environment_of(cache.protocol), given.out)
    return status


def _finished(key: str, given: argparse.Namespace) -> list[dict[str, object]]:
    """The results of a topic in the folder of the cells."""
    return stored(Cache(given.runs, protocol_of(topic_of(key), given)))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return exit_status(work, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
