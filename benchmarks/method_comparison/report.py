"""The report on results/method_comparison.jsonl: a table, a picture, and a section of the results page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, recorded
from benchmarks.frontier.results import facts
from benchmarks.frontier.tables import Table
from benchmarks.pages import DOCS, Section, link, write, written
from peft_safety.evaluation.metrics import figure_from_json
from peft_safety.reporting import render

NAME = "method_comparison"
HEADINGS = ("", "trained\nM", "accuracy\n%", "forgetting\nnats", "memory\nMiB", "step\ns", "set-up\ns", "file\nMiB")
Row = Mapping[str, Any]


def forgetting(row: Row) -> float:
    """Nats a token by which the loss on general text rose."""
    return row["general_after"] - row["general_before"]


def line(row: Row) -> tuple[str, ...]:
    """A row of the table."""
    return (
        row["arm"],
        f"{row['trainable'] / 1e6:.2f}",
        str(figure_from_json(row["accuracy"])).replace(" %", ""),
        f"{forgetting(row):+.3f}",
        str(row["added_mib"]),
        f"{row['step_cpu_seconds']:.1f}",
        f"{row['setup_cpu_seconds']:.0f}",
        f"{row['file_mib']:.1f}",
    )


def notes(environment: Row, rows: Sequence[Row], failed: Sequence[Row]) -> list[str]:
    """What a reader of the table needs."""
    before, made = figure_from_json(rows[0]["accuracy_before"]), max(row["calibration_cpu_seconds"] for row in rows)
    return [
        f"Before training: accuracy {before}, loss on general text {rows[0]['general_before']:.3f}. Brackets: 95 % "
        f"intervals; one seed. {environment['steps']} steps of {environment['batch_size']} rows, learning rate "
        f"{environment['lr']:g} (OSF half of it), q_proj and v_proj, LoRA of rank {environment['r']}.",
        "Memory: the peak of training less the bare model. Step and set-up: seconds of one core; GuardSpace is "
        f"calibrated in {made:.0f} s beside that, once.",
        *(f"{row['arm']} did not run: {row['failed']}" for row in failed),
    ]


def draw(rows: Sequence[Row], path: Path) -> Path:
    """Accuracy against forgetting, every point with its name."""
    canvas, (panel,) = render.figure(7.5, 4.5)
    place = -100.0
    for index, row in enumerate(sorted(rows, key=lambda row: row["accuracy"]["value"])):
        rate, x, color = figure_from_json(row["accuracy"]), forgetting(row), render.PALETTE[index]
        y, place = 100 * rate.value, max(100 * rate.value, place + 5)
        ends = [[y - 100 * rate.interval[0]], [100 * rate.interval[1] - y]]
        panel.errorbar([x], [y], yerr=ends, fmt="o", color=color, elinewidth=0.8)
        how = {"xycoords": "data", "textcoords": panel.get_yaxis_transform(), "color": color, "fontsize": 8}
        how["arrowprops"] = {"arrowstyle": "-", "color": color, "lw": 0.5, "alpha": 0.6}
        panel.annotate(row["arm"], (x, y), (1.02, place), va="center", **how)
    panel.set_xlabel("forgetting: rise of the loss on general text, nats a token (left is better)", fontsize=9)
    panel.set_ylabel("accuracy on the task, %", fontsize=9)
    panel.grid(color="0.92")
    return render.save_figure(canvas, path)


def read(folder: Path) -> tuple[Row, list[Row], list[Row]]:
    """The environment, the arms that ran and those that failed.

    Raises:
        DataError: no results.
    """
    environment, every = recorded(NAME, folder)
    rows, failed = ([row for row in every if ("failed" in row) == kind] for kind in (False, True))
    return environment, rows, failed


def section(folder: Path, page: Path) -> str:
    """The section of the page, as markdown."""
    environment, rows, failed = read(folder)
    headings = tuple(heading.replace("\n", ", ") for heading in HEADINGS)
    said = notes(environment, rows, failed)
    said += [f"Environment: {facts(environment)}."]
    said += [f"Written by `python -m benchmarks.report {NAME}` from `benchmarks/results/{NAME}.jsonl`."]
    table = Table(headings, [line(row) for row in rows]).markdown()
    picture = f"![accuracy against forgetting]({link(folder / f'{NAME}.png', page)})"
    return "\n".join([picture, "", *table, "", *(f"- {note}" for note in said)])


SECTIONS = (Section(NAME, f"results/{NAME}.md", section),)


def report(out: Path = RESULTS, docs: Path | None = DOCS) -> None:
    """Draw the picture next to the results, write the section of the page, and print the table.

    Raises:
        DataError: no results, or a page without markers. Nothing is written then.
    """
    environment, rows, failed = read(out)
    pages = {} if docs is None else written(SECTIONS, out, docs)
    draw(rows, out / f"{NAME}.png")
    write(pages)
    lines = [line(row) for row in rows]
    render.show(
        "PEFT's methods on sums in words", render.table(HEADINGS, lines), notes=notes(environment, rows, failed)
    )
