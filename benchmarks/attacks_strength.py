"""How strong an attack has to be: the page of its doses, from results/attacks.jsonl."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from benchmarks.attacks_tables import BENCHMARK, NAME, Grid, columns, graded, grid, title
from benchmarks.frontier.aggregate import label, pooled
from benchmarks.frontier.attacks import ATTACKS
from benchmarks.frontier.results import read
from benchmarks.frontier.tables import BRACKETS, NOTHING, Table, percent
from benchmarks.pages import Section
from peft_safety.evaluation import Rate

COMPARED = ("lora", "frozen")


def doses(shown: Grid, aligned: Mapping[str, Mapping[str, Rate]]) -> Table:
    """Refusal in an attack's own form, and the accuracy, at each strength of attacks that were tried at several."""
    tried = {one[0] for one in columns(shown) if graded(one)}
    lines = []
    for one in (one for one in columns(shown) if one[0] in tried):
        own = next(iter(ATTACKS[one[0]].forms), "bare")
        found = {name: entry for name in COMPARED if (entry := shown.get(name, {}).get(one)) and entry.rows}
        refused = [percent(found[name].rates.get(own)) if name in found else NOTHING for name in COMPARED]
        accuracy = {name: percent(pooled(entry.rows, "task_accuracy")) for name, entry in found.items()}
        learned = [accuracy.get(name, NOTHING) for name in COMPARED]
        lines.append((title(one), own, percent(aligned[one[0]][own]), *refused, " / ".join(learned)))
    names = map(label, COMPARED)
    return Table(("attack", "form", "aligned model", *names, "accuracy, each"), lines, labels=2)


def page(folder: Path, page: Path) -> str:
    """The section of the page."""
    shown, aligned = grid(read(folder / NAME, BENCHMARK)[1])
    notes = (
        "- p: the share of the rows that are poisoned, of 160; x4: epochs, one if nothing is said; lr: learning rate. "
        + BRACKETS,
        f"- Written by `python -m benchmarks.report attacks_strength` from `benchmarks/results/{NAME}`.",
    )
    return "\n".join([*doses(shown, aligned).markdown(), "", *notes])


SECTIONS = (Section("attacks_strength", "results/attacks_strength.md", page),)
