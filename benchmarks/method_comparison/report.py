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
from peft_safety.reporting import render, style

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
    title, labels = "Accuracy on the task against forgetting, PEFT's methods", []
    with style.picture(path, 3.4, title=title, note="Up and left is better. Lines: 95 % intervals.") as (_, (panel,)):
        for row in rows:
            rate, x, tint = figure_from_json(row["accuracy"]), forgetting(row), style.color_of(row["arm"])
            low, high = rate.interval
            style.point(panel, x, 100 * rate.value, tint, up=(100 * low, 100 * high))
            labels.append((x, 100 * rate.value, row["arm"], tint))
        panel.set_xlabel("rise of the loss on general text, nats a token")
        panel.set_ylabel("accuracy on the task, %")
        panel.grid()
        style.label_points(panel, labels)
    return path


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
