"""The report on results/attacks.jsonl: heat maps, and a section of the page of attacks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from textwrap import wrap

from benchmarks import attacks_strength
from benchmarks.attacks_tables import BENCHMARK, Grid, columns, graded, grid, results, table, title, works
from benchmarks.attacks_tables import SECTIONS as TABLES
from benchmarks.common import RESULTS
from benchmarks.frontier.aggregate import label
from benchmarks.frontier.results import read
from benchmarks.pages import DOCS, write, written
from peft_safety.evaluation import Rate
from peft_safety.reporting import style

SECTIONS = (*TABLES, *attacks_strength.SECTIONS)


def heat(shown: Grid, aligned: Mapping[str, Mapping[str, Rate]], path: Path) -> Path:
    """Points of refusal that each attack takes, attacks down, defenses across."""
    down, across = [one for one in columns(shown) if not graded(one)], list(shown)
    values = []
    for one in down:
        entries = [shown[name].get(one) for name in across]
        values.append(
            [100 * e.lost(aligned[one[0]])[0] if e is not None and e.rows else float("nan") for e in entries]
        )
    note = (
        "p: share of poisoned rows; x4: four epochs; lr: learning rate. Hatched: not run. Gray names: fails on "
        "plain LoRA."
    )
    height = 2.3 + 0.18 * len(down)
    heading = "Points of refusal lost to each attack, worst seed and form of the request"
    with style.picture(path, height, title=heading, note=note) as (_, (axis,)):
        style.heat(axis, values, ".0f", 0, 100, "#FFFFFF", style.color_of("lora"), "#6B2F00")
        heads = ["\n".join(wrap(label(name), 22)) for name in across]
        axis.set_xticks(range(len(across)), heads, rotation=90, ma="left", linespacing=1.1)
        axis.set_yticks(range(len(down)), [title(one) for one in down])
        for tick, one in zip(axis.get_yticklabels(), down, strict=True):
            tick.set_color(style.MUTED if works(shown, aligned, one) is False else style.INK)
        axis.tick_params(labeltop=True, labelbottom=False)
    return path


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
