"""The table: what plain LoRA passes, and how the other arms end there, by kind."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import peft

from benchmarks.common import RESULTS, record
from benchmarks.peft_suite.arms import ARMS
from benchmarks.peft_suite.kinds import DIFFERENCES, KINDS, REASONS
from benchmarks.peft_suite.plugin import finished
from benchmarks.peft_suite.run import passing, results_file
from peft_safety import errors
from peft_safety.errors import PeftSafetyError

NAME = "peft_suite"
WIDTH = 80
OTHERS = "others"
TYPED = {name for name, cls in vars(errors).items() if isinstance(cls, type) and issubclass(cls, PeftSafetyError)}
"""Names of this package's errors."""


def kind_of(row: dict[str, Any], arm: str = "") -> tuple[str, str]:
    """What became of a test: "passed", "refused", "by design" or "undeclared", and the kind. A test that expects an
    error of PEFT's and gets a typed one is refused, too.
    """
    if row["outcome"] == "passed":
        return "passed", ""
    typed = [*row.get("chain", ())[:1], *reversed(row.get("raised", ()))]
    for entry in typed:
        if entry["error"] in TYPED:
            name = next((kind.name for kind in KINDS if re.search(kind.says, entry["says"], re.DOTALL)), "")
            return "refused", name or f"{entry['error']}: {entry['says'][:50]}"
    for kind in DIFFERENCES:
        if row["outcome"] == "failed" and kind.arm in ("", arm) and re.search(kind.tests, row["test"]):
            return "by design", kind.name
    first = (row.get("chain") or [{"error": row["outcome"], "says": ""}])[0]
    return "undeclared", f"{first['error']}: {first['says'][:50]}"


def counted(folder: Path, arm: str, files: Iterable[str]) -> Counter[tuple[str, str]]:
    """Tests of an arm by outcome and kind, of those that plain LoRA passes; those that have not run are "missing"."""
    result: Counter[tuple[str, str]] = Counter()
    for file in files:
        rows = finished(results_file(folder, arm, file))
        for test in passing(folder, file):
            result[kind_of(rows[test], arm) if test in rows else ("missing", "")] += 1
    return result


def report(folder: Path, files: Sequence[str], out: Path = RESULTS) -> None:
    """Print the table of every arm that has run, and write the counts to `out/peft_suite.jsonl`."""
    rows = []
    for arm in ARMS:
        if arm != "plain" and (folder / "results" / arm).is_dir():
            counts = counted(folder, arm, files)
            print("\n".join(table(arm, counts)))
            rows += [{"arm": arm, "outcome": o, "kind": k, "tests": n} for (o, k), n in summed(counts).items()]
    record(NAME, rows, {"peft": peft.__version__}, out)


def summed(counts: Counter[tuple[str, str]]) -> Counter[tuple[str, str]]:
    """The counts with what has no name of its own put together, the largest first."""
    result: Counter[tuple[str, str]] = Counter()
    for (outcome, kind), number in counts.items():
        result[outcome, kind if not kind or kind in REASONS else OTHERS] += number
    return Counter(dict(result.most_common()))


def table(arm: str, counts: Counter[tuple[str, str]]) -> list[str]:
    """Lines of at most `WIDTH` characters."""
    sums: Counter[str] = Counter()
    for (outcome, _), number in counts.items():
        sums[outcome] += number
    head = ", ".join(f"{number} {outcome}" for outcome, number in sorted(sums.items()))
    lines = [f"{arm}: of {sums.total()} tests that plain LoRA passes, {head}"]
    for (outcome, kind), number in counts.most_common():
        if kind:
            text = " ".join(kind.split())
            lines.append(f"  {number:5}  {outcome:10}  {text}"[:WIDTH])
    return [*lines, ""]
