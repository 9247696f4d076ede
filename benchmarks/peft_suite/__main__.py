"""PEFT's own tests with this package's configs in place of `LoraConfig`.

    pip download --no-deps --no-binary :all: peft==X     the source distribution of the installed PEFT has its tests
    python -m benchmarks.peft_suite TESTS --arm plain    what plain LoRA passes, without a network or an accelerator
    python -m benchmarks.peft_suite TESTS --arm frozen   those tests with GuardSpace's frozen form
    python -m benchmarks.peft_suite TESTS --report       the table of all arms that have run

Bases are random, models are tiny local ones (`models.py`), and nothing of PEFT is kept. Each test has a line in a
results file, so a stopped run continues.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import RESULTS
from benchmarks.peft_suite.arms import ARMS
from benchmarks.peft_suite.models import build
from benchmarks.peft_suite.report import report
from benchmarks.peft_suite.run import FILES, run
from benchmarks.peft_suite.sources import copy_tests


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 1 if a file of tests did not come to its end."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peft_suite",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("tests", type=Path, help="the folder tests of PEFT's source distribution")
    parser.add_argument("--arm", action="append", choices=tuple(ARMS), help="may be repeated")
    parser.add_argument("--file", action="append", choices=FILES, help="only this file of tests; may be repeated")
    parser.add_argument("--runs", type=Path, default=Path("runs", "peft_suite"), help="folder of the results")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the counts")
    parser.add_argument("--report", action="store_true", help="show the results, and record their counts")
    given = parser.parse_args(argv)
    folder, files = given.runs.resolve(), given.file or FILES
    folder.mkdir(parents=True, exist_ok=True)
    broken = []
    if given.arm:
        for name, problem in build(folder / "hub").items():
            print(f"no model {name}: {problem}", file=sys.stderr)
        tests = copy_tests(given.tests.resolve(), folder)
        broken = [f"{arm}: {file}" for arm in given.arm for file in run(tests, folder, arm, files)]
    if given.report:
        report(folder, files, given.out)
    for name in broken:
        print(f"{name} did not come to its end. Run it again.", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
