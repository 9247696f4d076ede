"""The sections that the examples' reports (`benchmarks/results/*.json`) write: demo.md, patches.md, repair.md,
older_patch.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.frontier.results import facts
from benchmarks.frontier.tables import NOTHING, Table
from benchmarks.pages import Section, link
from peft_safety.errors import DataError
from peft_safety.evaluation.metrics import figure_from_json

OLDER = "Older patch and judge: see the page of the older patch."
AUDIT = {
    "metric": "published metric",
    "metric_null": "of random updates",
    "z": "z",
    "general": "general outputs moved",
    "harmful": "harmful ones moved",
}
"""Of the audit of a patch: key -> heading."""


def read(folder: Path, name: str) -> dict[str, Any]:
    """The report of an example.

    Raises:
        DataError: there is none.
    """
    path = folder / f"{name}.json"
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        data["arms"], data["environment"]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} holds no report ({type(error).__name__}). Run its example first.") from error
    return data


def arms(data: Mapping[str, Any]) -> Table:
    """A line an arm, a column a figure."""
    shown = data["arms"]
    heads = list(dict.fromkeys(name for figures in shown.values() for name in figures))
    lines = [
        (arm, *(str(figure_from_json(figures[head])) if figures.get(head) else NOTHING for head in heads))
        for arm, figures in shown.items()
    ]
    return Table(("", *heads), lines)


def counts(data: Mapping[str, Any]) -> str:
    """How many prompts each figure is over."""
    first = next(iter(data["arms"].values()))
    return "N: " + ", ".join(f"{name} {figure['n']}" for name, figure in first.items())


def section(name: str, command: str, page: str, *notes: str) -> Section:
    """A section: picture, table, notes."""

    def text(folder: Path, page: Path) -> str:
        data, picture = read(folder, name), folder / f"{name}.png"
        shown = [f"![{data['title']}]({link(picture, page)})", ""] if picture.is_file() else []
        lines = [*shown, *arms(data).markdown(), "", *further(name, data)]
        lines += [f"- {note.rstrip('.')}." for note in (*notes, *data["notes"], counts(data))]
        lines += [f"- Environment: {facts(data['environment'])}. Command of the figures: `{command}`."]
        lines += [f"- Written by `python -m benchmarks.report {name}` from `benchmarks/results/{name}.json`."]
        return "\n".join(lines)

    return Section(name, page, text)


def further(name: str, data: Mapping[str, Any]) -> Sequence[str]:
    """A second table, where an example has one."""
    if name != "patch":
        return ()
    lines = []
    for key, audit in data["details"].items():
        if key.startswith("audit of "):
            figures = [audit[field] for field in AUDIT]
            shown = [f"{value:.2f}" if field < 3 else f"{100 * value:.1f} %" for field, value in enumerate(figures)]
            lines.append((key.removeprefix("audit of "), *shown))
    apart = f"{data['details']['orthogonality']:.0e}"
    table = Table(("the update, median layer", *AUDIT.values()), lines)
    return (*table.markdown(), "", f"The second of two patches is orthogonal to the first to {apart}.", "")


SECTIONS = (
    section("demo", "make demo", "results/demo.md"),
    section("safety_patch", "python -m examples.safety_patch", "results/demo.md"),
    section("repair", "python -m examples.repair", "results/repair.md", OLDER),
    section("patch", "python -m examples.patch", "results/patches.md", OLDER),
    section("fuse", "python -m examples.fuse", "results/older_patch.md"),
)
