"""The report on results/method_comparison.jsonl: a table, a picture, and a section of the results page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import PAGE, RESULTS, link, publish, with_section
from benchmarks.frontier.results import facts
from benchmarks.frontier.tables import Table
from peft_safety.errors import DataError
from peft_safety.evaluation.metrics import figure_from_json
from peft_safety.reporting import render, style

NAME = "method_comparison"
MARKERS = (f"<!-- {NAME}:begin -->", f"<!-- {NAME}:end -->")
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


def report(out: Path = RESULTS, page: Path | None = PAGE) -> None:
    """Draw the picture next to the results, write the section of the page, and print the table.

    Raises:
        DataError: no results, or a page without markers. Nothing is written then.
    """
    path = out / f"{NAME}.jsonl"
    if not path.is_file():
        raise DataError(f"{path} holds no results. Run python -m benchmarks.{NAME}.")
    first, *every = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    environment, rows = first["environment"], [row for row in every if "failed" not in row]
    lines, said = [line(row) for row in rows], notes(environment, rows, [row for row in every if "failed" in row])
    picture = path.with_suffix(".png")
    if page is not None:
        headings = tuple(heading.replace("\n", ", ") for heading in HEADINGS)
        listed = [*said, f"Environment: {facts(environment)}.", f"Written by `python -m benchmarks.{NAME} --report`."]
        parts = [f"![accuracy against forgetting]({link(picture, page)})", "", *Table(headings, lines).markdown(), ""]
        publish(page, with_section(page, MARKERS, "\n".join([*parts, *(f"- {note}" for note in listed)])))
    draw(rows, picture)
    render.show("PEFT's methods on sums in words", render.table(HEADINGS, lines), notes=said)
