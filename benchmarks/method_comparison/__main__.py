"""PEFT's methods and GuardSpace on one small task: accuracy, forgetting, memory, time and file size.

    python -m benchmarks.method_comparison [--budget MINUTES]   run the missing arms; a stopped run continues
    python -m benchmarks.method_comparison --smoke              two steps of every arm, no results
    python -m benchmarks.method_comparison --report             the picture and the section of docs/results

A local twin of PEFT's `method_comparison/MetaMathQA`, whose entry for GuardSpace is in the folder metamathqa. Sums in
words ("thirty-eight plus four =") take the place of word problems, and the model's own answers to general prompts
that of Wikipedia: forgetting is what their loss (nats a token) rises by. One seed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.common import RESULTS, add_model, model_name, model_source, parser_of, record
from benchmarks.method_comparison.arms import ARMS
from benchmarks.method_comparison.cells import Cells, Settings
from benchmarks.method_comparison.report import NAME, report
from benchmarks.pages import DOCS
from peft_safety.reporting.report import environment

SMOKE = Settings(r=8, steps=2, test=8, general=4)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 1 if an arm failed."""
    import torch

    parser = parser_of(__doc__)
    parser.prog = f"python -m benchmarks.{NAME}"
    add_model(parser)
    parser.add_argument("--budget", type=float, default=float("inf"), help="minutes after which no further arm starts")
    parser.add_argument("--smoke", action="store_true", help="a quick check that everything runs")
    parser.add_argument("--report", action="store_true", help="only show the last results again")
    parser.add_argument("--runs", type=Path, default=Path("runs", NAME), help="folder of finished arms")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    given = parser.parse_args(argv)
    if given.report:
        report(given.out, DOCS if given.out == RESULTS else None)
        return 0
    settings, failed, started = SMOKE if given.smoke else Settings(), [], time.monotonic()
    cells = Cells(given.runs, model_source(given.model), settings)
    for arm in ARMS:
        if cells.get(arm) is not None or time.monotonic() - started >= 60 * given.budget:
            continue
        try:
            row = cells.run(arm)
        except Exception as error:  # the other arms still run; what it said is in the results
            failed.append({"arm": arm, "failed": f"{type(error).__name__}: {error}"})
            print(arm, failed[-1]["failed"], sep=": ", file=sys.stderr)
        else:
            print(f"{arm}: {row['accuracy']['k']} of {row['accuracy']['n']} right, loss {row['loss']:.2f}", flush=True)
    rows = [row for arm in ARMS if (row := cells.get(arm)) is not None]
    if not given.smoke:
        facts = {"model": model_name(given.model), "threads": torch.get_num_threads(), **asdict(settings)}
        path = record(NAME, [*rows, *failed], environment(**facts), given.out)
        print(f"{len(rows)} of {len(ARMS)} arms in {path}. Render with --report.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
