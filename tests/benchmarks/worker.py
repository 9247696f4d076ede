"""A process that works through a small plan: `python worker.py FOLDER SECONDS`. Its work is made up, and written to a
log when it begins.
"""

import os
import sys
import time
from pathlib import Path

from benchmarks.common import record
from benchmarks.frontier.cache import Cache
from benchmarks.frontier.cells import Cell, Protocol, needs
from benchmarks.frontier.plan import METHODS, plan
from benchmarks.frontier.results import BENCHMARK, stored
from benchmarks.frontier.run import run

CELLS = plan([METHODS[name] for name in ("aligned", "lora", "guardspace", "scaled:guardspace")], [0.1, 0.5], [0, 1])


def made_up(cell: Cell) -> dict:
    """Figures that depend on the cell alone."""
    return {"refusal": {"value": len(cell.label()) / 100}, "norm": 1.0 + cell.poison}


def main(folder: Path, seconds: float) -> None:
    cache = Cache(folder, Protocol())

    def work(cell: Cell) -> dict:
        with (folder / "log").open("a") as log:
            log.write(f"{os.getpid()} {cache.protocol.key(cell)}\n")
        time.sleep(seconds)
        return made_up(cell)

    outcome = run(cache, lambda: CELLS, work, needs=needs)
    record(BENCHMARK, stored(cache), {"model": "none"}, folder / "out")
    sys.exit(1 if outcome.failed else 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
