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
from peft_safety.reporting import render

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
