"""docs/compatibility.md, made of the tables behind `test_cells.py`: `python -m tests.compatibility.page`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS
from benchmarks.peft_suite.kinds import REASONS
from benchmarks.peft_suite.report import NAME, OTHERS
from tests.compatibility import architectures, bases, features
from tests.compatibility.methods import METHODS, PLAIN

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
ARMS = {"frozen": 'GuardSpace, `train="B"`', "salora": "SaLoRA"}
OUTCOMES = ("passed", "refused", "by design", "undeclared", "missing")
HEAD = """\
# What works with which method?

Each cell is a test of the same name in `tests/compatibility/test_cells.py`, on a tiny model: calibrate, train a step,
save, load onto a new base, and compute the same. "limit" and "no" have a note below their table; "no" is a typed error
that comes before the model is changed. An open cell was not run. `python -m tests.compatibility.page` makes this page,
and a test compares it.

"GuardSpace B", "window" and "A" are the forms of `train`; "patch" is `OrthoSafetyPatchConfig`. `SafeLoRAConfig` is
plain LoRA until the repair. Targets are "all-linear" unless a note says otherwise.
"""
SUITE = """\
## PEFT's own tests

`benchmarks/peft_suite` runs the tests of PEFT's source distribution with these configs in place of `LoraConfig`: bases
are random, models tiny and local, nothing of PEFT is kept. Without a network and an accelerator:

```bash
pip download --no-deps --no-binary :all: peft==0.21.2
python -m benchmarks.peft_suite peft-0.21.2/tests --arm plain --arm frozen --arm salora --report
```
"""


class Notes:
    """Numbers for sentences, in the order in which they come."""

    def __init__(self) -> None:
        self.sentences: list[str] = []

    def number(self, sentence: str) -> int:
        if sentence not in self.sentences:
            self.sentences.append(sentence)
        return self.sentences.index(sentence) + 1

    def lines(self) -> list[str]:
        return [f"{index}. {sentence}" for index, sentence in enumerate(self.sentences, 1)]


def cell(row: str, method: str, refused: Mapping[str, Any], limits: Mapping[str, Any], notes: Notes) -> str:
    for word, table in (("no", refused), ("limit", limits)):
        entry = table.get(row)
        if entry is not None and method in entry[0]:
            return f"{word} ({notes.number(entry[1])})"
    return "works"


def table(title: str, rows: Iterable[str], of: Callable[[str, str, Notes], str]) -> list[str]:
    """A heading, the table of all methods, and its notes."""
    notes = Notes()
    lines = ["", f"## {title}", "", f"| | {' | '.join(METHODS)} |", "| --- " * (len(METHODS) + 1) + "|"]
    lines += [f"| {row} | {' | '.join(of(row, method, notes) for method in METHODS)} |" for row in rows]
    return [*lines, "", *notes.lines()]


def of_option(row: str, method: str, notes: Notes) -> str:
    if method == PLAIN and row in features.NOT_RUN:
        return ""
    return cell(row, method, features.REFUSED, features.LIMITS, notes)


def of_base(row: str, method: str, notes: Notes) -> str:
    if row in bases.RUN:
        quantized = "bitsandbytes" in row and method != PLAIN
        return f"limit ({notes.number(bases.QUANTIZED_LIMIT)})" if quantized else "works"
    if row in bases.LIBRARY:
        return "works" if method == PLAIN else f"limit ({notes.number(bases.LIBRARY_LIMIT)})"
    if method not in bases.PACKED_CELLS:
        return ""
    word, _ = bases.PACKED_CELLS[method]
    sentence = {"no": bases.PACKED_REFUSED, "limit": bases.PACKED_LIMIT}.get(word)
    return word if sentence is None else f"{word} ({notes.number(sentence)})"


def of_architecture(row: str, method: str, notes: Notes) -> str:
    return cell(row, method, architectures.REFUSED, architectures.LIMITS, notes)


def page() -> str:
    lines = table("Options of LoRA", features.FEATURES, of_option)
    packed = [name for name in bases.PACKED if not any(row.startswith(name) for row in bases.LIBRARY)]
    lines += table("Base weights", [*bases.RUN, *bases.LIBRARY, *packed], of_base)
    lines += [
        "",
        f"torchao and HQQ are in `tests/peft/test_libraries.py`, on the libraries themselves. The last {len(packed)} "
        "are in\n`tests/peft/test_packed.py`, on stand-ins for what is not installed; GPTQ also on gptqmodel's own "
        "layers.\nTensor parallelism: [several_gpus.md](guides/several_gpus.md#what-works).",
    ]
    lines += table("Architectures", architectures.ARCHITECTURES, of_architecture)
    return HEAD + "\n".join(lines) + "\n\n" + SUITE + "\n" + "\n".join(suite()) + "\n"


def suite(path: Path = RESULTS / f"{NAME}.jsonl") -> list[str]:
    """What became of PEFT's tests, by arm; then the kinds of refusals and of differences by design."""
    environment, *rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    counts = {
        (outcome, arm): sum(row["tests"] for row in rows if (row["arm"], row["outcome"]) == (arm, outcome))
        for outcome in OUTCOMES
        for arm in ARMS
    }
    number = sum(counts[outcome, "frozen"] for outcome in OUTCOMES)
    lines = [
        f"With PEFT {environment['environment']['peft']}, of {number:,} tests that plain LoRA passes "
        '("refused" is a typed error, "undeclared" anything else, "missing" was not run):',
        "",
        f"| | {' | '.join(ARMS.values())} |",
        "| --- " + "| ---: " * len(ARMS) + "|",
    ]
    lines += [f"| {outcome} | {' | '.join(f'{counts[outcome, arm]:,}' for arm in ARMS)} |" for outcome in OUTCOMES]
    for outcome, title in (("refused", "refused, by kind"), ("by design", "by design, by kind")):
        kinds: dict[str, Counter[str]] = {}
        for row in rows:
            if row["outcome"] == outcome:
                kinds.setdefault(row["kind"], Counter())[row["arm"]] += row["tests"]
        order = sorted(kinds, key=lambda kind: (kind == OTHERS, -kinds[kind]["frozen"], kind))
        lines += ["", f"| {title} | {' | '.join(ARMS.values())} | why |"]
        lines += ["| --- " + "| ---: " * len(ARMS) + "| --- |"]
        for kind in order:
            lines.append(f"| {kind} | {' | '.join(str(kinds[kind][arm]) for arm in ARMS)} | {REASONS.get(kind, '')} |")
    return lines


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
