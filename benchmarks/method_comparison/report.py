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


def read(path: Path) -> tuple[dict[str, Any], list[Row], list[Row]]:
    """The environment, the arms that ran, and those that did not.

    Raises:
        DataError: no results.
    """
    if not path.is_file():
        raise DataError(f"{path} holds no results. Run python -m benchmarks.{NAME}.")
    environment, *rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return environment["environment"], [r for r in rows if "failed" not in r], [r for r in rows if "failed" in r]


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
        f"{row['added_mib']}",
        f"{row['step_cpu_seconds']:.1f}",
        f"{row['setup_cpu_seconds']:.0f}",
        f"{row['file_mib']:.1f}",
    )


def notes(environment: Row, rows: Sequence[Row], failed: Sequence[Row]) -> list[str]:
    """What a reader of the table needs."""
    first = rows[0]
    before, general = figure_from_json(first["accuracy_before"]), first["general_before"]
    made = max(row["calibration_cpu_seconds"] for row in rows)
    return [
        f"Before training: accuracy {before}, loss on general text {general:.3f}. Brackets: 95 % intervals; one seed.",
        f"{environment['steps']} steps of {environment['batch_size']} rows at a learning rate of {environment['lr']:g} "
        f"(OSF half of it), q_proj and v_proj, LoRA's rank {environment['r']}; the others of equal size.",
        "Memory: the peak of training less the bare model. Step and set-up: seconds of one core; GuardSpace is "
        f"calibrated in {made:.0f} s beside that, once.",
        *(f"{row['arm']} did not run: {row['failed']}" for row in failed),
    ]


def draw(rows: Sequence[Row], path: Path) -> Path:
    """Accuracy against forgetting, every point with its name."""
    canvas, (panel,) = render.figure(7.5, 4.5)
    for index, row in enumerate(rows):
        rate, x = figure_from_json(row["accuracy"]), forgetting(row)
        ends = [[100 * (rate.value - rate.interval[0])], [100 * (rate.interval[1] - rate.value)]]
        color = render.PALETTE[index % len(render.PALETTE)]
        panel.errorbar([x], [100 * rate.value], yerr=ends, fmt="o", color=color, elinewidth=0.8)
        panel.annotate(row["arm"], (x, 100 * rate.value), (6, 4), textcoords="offset points", color=color, fontsize=8)
    panel.set_xlabel("forgetting: rise of the loss on general text, nats a token (left is better)", fontsize=9)
    panel.set_ylabel("accuracy on the task, %", fontsize=9)
    panel.grid(color="0.92")
    panel.margins(x=0.2)
    return render.save_figure(canvas, path)


def section(environment: Row, rows: Sequence[Row], failed: Sequence[Row], picture: str) -> str:
    """The section of the page, as markdown."""
    lines = [f"![accuracy against forgetting of each method]({picture})", ""]
    headings = tuple(heading.replace("\n", ", ") for heading in HEADINGS)
    lines += [*Table(headings, [line(row) for row in rows]).markdown(), ""]
    lines += [f"- {note}" for note in notes(environment, rows, failed)]
    lines += [f"- Environment: {facts(environment)}.", f"- Written by `python -m benchmarks.{NAME} --report`."]
    return "\n".join(lines)


def report(out: Path = RESULTS, page: Path | None = PAGE) -> None:
    """Print the table, draw the picture next to the results, and write the section of the page.

    Raises:
        DataError: no results, or a page without markers. Nothing is written then.
    """
    environment, rows, failed = read(out / f"{NAME}.jsonl")
    path = out / f"{NAME}.png"
    if page is not None:
        text = with_section(page, MARKERS, section(environment, rows, failed, link(path, page)))
        publish(page, text)
    draw(rows, path)
    table = render.table(HEADINGS, [line(row) for row in rows])
    render.show("Methods on sums in words", table, notes=notes(environment, rows, failed))
