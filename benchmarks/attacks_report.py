"""The report on results/attacks.jsonl: heat maps, and a section of the page of attacks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from textwrap import wrap

from benchmarks.attacks_tables import BENCHMARK, SECTIONS, Grid, columns, grid, results, table, title, works
from benchmarks.common import RESULTS
from benchmarks.frontier.aggregate import label
from benchmarks.frontier.pictures import saved
from benchmarks.frontier.results import read
from benchmarks.pages import DOCS, write, written
from peft_safety.evaluation import Rate


def heat(shown: Grid, aligned: Mapping[str, Mapping[str, Rate]], path: Path) -> Path:
    """Points of refusal that each attack takes, attacks down, defenses across."""
    from matplotlib.figure import Figure

    down, across = columns(shown), list(shown)
    values = []
    for one in down:
        entries = [shown[name].get(one) for name in across]
        values.append(
            [100 * e.lost(aligned[one[0]])[0] if e is not None and e.rows else float("nan") for e in entries]
        )
    canvas = Figure(figsize=(2.6 + 0.85 * len(across), 1.9 + 0.28 * len(down)), layout="constrained")
    axis = canvas.subplots()
    axis.imshow(values, cmap="YlOrBr", vmin=0, vmax=110, aspect="auto")
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            text = "not run" if math.isnan(value) else f"{value:.0f}"
            small, color = (7, "0.6") if math.isnan(value) else (9, "white" if value > 60 else "black")
            axis.text(x, y, text, ha="center", va="center", fontsize=small, color=color)
    axis.set_xticks(range(len(across)), ["\n".join(wrap(label(name), 14)) for name in across], fontsize=8)
    axis.set_yticks(range(len(down)), [title(one) for one in down], fontsize=9)
    for tick, one in zip(axis.get_yticklabels(), down, strict=True):
        tick.set_color("0.6" if works(shown, aligned, one) is False else "black")
    axis.tick_params(length=0, top=True, bottom=False, labeltop=True, labelbottom=False)
    axis.spines[:].set_visible(False)
    axis.set_xlabel("points lost, worst form (gray: fails on plain LoRA)", fontsize=8)
    return saved(canvas, path)


def report(out: Path = RESULTS, docs: Path | None = DOCS) -> None:
    """Write a picture next to each results file, and the section of the page.

    Raises:
        DataError: no results, or a page without markers. Nothing is written then.
    """
    grids = {path: grid(read(path, BENCHMARK)[1]) for path in results(out)}
    pages = {} if docs is None else written(SECTIONS, out, docs)
    for path, (shown, aligned) in grids.items():
        heat(shown, aligned, path.with_suffix(".png"))
    write(pages)
    for path, (shown, aligned) in grids.items():
        print(f"{path.stem}:", *table(shown, aligned).markdown(), sep="\n")
    print("wrote the pictures beside them" + "".join(f", and the section of {page}" for page in pages))
