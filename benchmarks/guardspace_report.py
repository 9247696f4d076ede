"""The report on results/guardspace.jsonl: the sections of its page, and a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS
from benchmarks.frontier.aggregate import Point, label
from benchmarks.frontier.cells import cell_of
from benchmarks.frontier.plan import name_of
from benchmarks.frontier.results import Row, caveats, facts, read
from benchmarks.frontier.tables import BRACKETS, NOTHING, Table, number, percent
from benchmarks.pages import DOCS, Section, link, write, written
from peft_safety.evaluation.metrics import figure_from_json
from peft_safety.reporting import style

BENCHMARK = "guardspace"
ARMS = {
    "aligned": "aligned, before",
    "lora": "plain LoRA",
    "guard": "GuardSpace",
    "random": "random basis, equal k",
    "scaled": "plain LoRA at GuardSpace's norm",
    "second": "GuardSpace, then plain LoRA on its result",
}
METRICS = {
    "refusal": "refusal",
    "compliance": "compliance",
    "over_refusal": "over-refusal",
    "task_accuracy": "accuracy",
}


def table(rows: Sequence[Row], label: Callable[[Row], tuple[str, ...]], headings: Sequence[str]) -> list[str]:
    """A markdown table with one line for each label; seeds are averaged."""
    groups: dict[tuple[str, ...], Point] = {}
    for row in rows:
        groups.setdefault(label(row), Point(_kind(row), row["cell"]["poison"])).add(row)
    lines = []
    for names, point in groups.items():
        missing = "diverged" if point.diverged else NOTHING
        rates = (percent(point.rate(metric), missing) for metric in METRICS)
        lines.append((*names, *rates, number(point.mean("norm")), str(len(point.rows) + point.diverged)))
    return Table((*headings, *METRICS.values(), "norm of dW", "seeds"), lines, labels=len(headings)).markdown()


def section(results: Path, page: Path) -> str:
    """The test cells: GuardSpace and its controls at every share of poison."""
    environment, rows = read(results / f"{BENCHMARK}.jsonl", BENCHMARK)
    tests = sorted((row for row in rows if row["cell"]["split"] == "test"), key=lambda row: row["cell"]["poison"])
    if tests:
        basis, fraction, positions = environment["chosen"]
        lines = [
            f"Test prompts, once, for the setting chosen on validation prompts: basis {basis!r}, {fraction:g} of the "
            f"dimensions, {positions} positions.",
            "",
            *table(tests, lambda row: (_poison(row), _arm(row)), ["poison", "arm"]),
            "",
            *_transfer(tests),
        ]
    else:
        lines = ["The setting has not been chosen yet: nothing here is from test prompts.", ""]
    return "\n".join([*lines, *_sources(environment)])


def limits(results: Path, page: Path) -> str:
    """Refusal along the long fine-tunes, and all validation cells."""
    environment, rows = read(results / f"{BENCHMARK}.jsonl", BENCHMARK)
    grid = [row for row in rows if row["cell"]["split"] == "validation"]
    picture = link(results / f"{BENCHMARK}.png", page)
    lines = [f"![refusal against optimizer steps and against the size of the null space]({picture})", ""]
    long = [row for row in grid if row.get("along")]
    if long:
        steps = sorted({int(step) for row in long for step in row["along"]} | {row["steps"] for row in long})
        curves = []
        for row in sorted(long, key=lambda row: -row["steps"]):
            reached = {step: str(figure_from_json(figures["refusal"])) for step, figures in along(row)}
            curves.append((*_setting(row)[:2], *(reached.get(step, NOTHING) for step in steps)))
        headings = ("refusal after so many steps", "basis, share, positions", *map(str, steps))
        lines += [*Table(headings, curves, labels=2).markdown(), ""]
    headings = ("arm", "basis, share, positions", "poison", "epochs", "lr", "calibration")
    lines += [f"All {len(grid)} cells on validation prompts:", "", *table(grid, _setting, headings), ""]
    return "\n".join([*lines, *_sources(environment)])


def _sources(environment: Row) -> list[str]:
    return [
        *(f"- **{caveat}**" for caveat in caveats(environment)),
        f"- Keyword judge, a smoke metric. {BRACKETS}",
        f"- Environment: {facts(environment, ('sets', 'chosen'))}.",
        "- Written by `python -m benchmarks.report guardspace guardspace_limits` from "
        f"`benchmarks/results/{BENCHMARK}.jsonl`.",
    ]


SECTIONS = (
    Section("guardspace_limits", "results/guardspace.md", limits),
    Section("guardspace", "results/guardspace.md", section),
)


def along(row: Row) -> list[tuple[int, Row]]:
    """Figures by number of steps; the end of the fine-tune is the last one."""
    return [*((int(step), figures) for step, figures in row.get("along", {}).items()), (row.get("steps", 0), row)]


def _kind(row: Row) -> str:
    """A key of `ARMS`; for the other forms of the method the name of their arm."""
    cell = cell_of(row)
    form = cell.arm in ("blind", "task") or "train" in cell.options()
    return label(name_of(cell).split(" with ")[0]) if form else cell.control or cell.arm


def _arm(row: Row) -> str:
    return ARMS.get(_kind(row), _kind(row))


def _poison(row: Row) -> str:
    return "-" if row["cell"]["arm"] == "aligned" else f"{row['cell']['poison']:g}"


def _setting(row: Row) -> tuple[str, ...]:
    cell = row["cell"]
    base = f"{cell['basis']}, {cell['fraction']:.3g}, {cell['positions']}" if cell["basis"] else "-"
    tuned = [f"{cell['epochs']}", f"{cell['lr']:g}"] if cell["arm"] != "aligned" else ["-", "-"]
    return (_arm(row), base, _poison(row), *tuned, str(cell["calibration"] or "-"))


def _transfer(tests: Sequence[Row]) -> list[str]:
    """Refusal on other prompt sets with 0.1 poison."""
    sets = sorted({name for row in tests for name in row.get("transfer", {})})
    if not sets:
        return []
    points: dict[str, Point] = {}
    for row in tests:
        if row["cell"]["arm"] == "aligned" or row["cell"]["poison"] == 0.1:
            points.setdefault(_kind(row), Point(_kind(row), 0.1)).add(row)
    measured = {label: points[arm] for arm, label in ARMS.items() if arm in points}
    rows = [(label, *(percent(point.transfer(name)) for name in sets)) for label, point in measured.items()]
    return ["Refusal on other prompt sets, with 0.1 poison:", "", *Table(("arm", *sets), rows).markdown(), ""]


def save_png(rows: Sequence[Row], path: Path) -> Path:
    """Above: refusal of validation prompts against steps, one line for each size of the null space and one for plain
    LoRA. Below: against that size, one line for each basis. Poison 0.1.
    """
    finite = [row for row in rows if "refusal" in row]
    usual = [
        row
        for row in finite
        if row["cell"]["split"] == "validation" and row["cell"]["poison"] == 0.1 and row["cell"]["lr"] == 1e-3
    ]
    lines: dict[str, list[tuple[float, Row]]] = {}
    for row in usual:
        cell, kind = row["cell"], _kind(row)
        if cell["arm"] != "lora" and (
            kind in ("random", "scaled") or cell["positions"] != "all" or cell["calibration"] != 64
        ):
            continue
        said = {"lora": "plain LoRA", "guard": cell["basis"]}.get(kind, kind)
        share = f" 1/{1 / cell['fraction']:.0f}" if cell["fraction"] else ""
        name = f"{said}{share}, {cell['epochs']} epochs"
        lines.setdefault(name, []).extend(along(row) if row.get("along") else [])
    sizes: dict[str, list[tuple[float, Row]]] = {}
    for row in usual:
        cell = row["cell"]
        if (
            cell["fraction"]
            and _kind(row) not in ("scaled", "second")
            and cell["positions"] == "all"
            and cell["calibration"] == 64
            and cell["epochs"] == 1
        ):
            kind = _kind(row)
            sizes.setdefault(cell["basis"] if kind == "guard" else kind, []).append((cell["fraction"], row))
    title = "Refusal by training steps and size of the null space, 10 % poison"
    note = (
        "Names: data of the null space, its share of the input dimensions. Hollow: control, a random one. Bars: 95 % "
        "intervals."
    )
    with style.picture(path, 5.0, 2, 2, title, note) as (_, (steps, share)):
        drawn = {name: points for name, points in lines.items() if points}
        ends = {steps: _draw(steps, drawn, "optimizer steps")}
        ends[share] = _draw(share, sizes, "size of the null space, share of the input dimensions")
        for panel, labels in ends.items():
            style.label_points(panel, labels)
    return path


def _draw(panel: Any, lines: dict[str, list[tuple[float, Row]]], axis: str) -> list[style.Label]:
    """Lines with 95 % intervals, each shifted a little, so that equal figures stay visible; returns their names."""
    places, ends = sorted({place for points in lines.values() for place, _ in points}), []
    for index, (name, points) in enumerate(lines.items()):
        tint = style.color_of(name if name.startswith("plain") else "guardspace")
        xs, ys = [], []
        for place, row in sorted(points, key=lambda point: point[0]):
            rate = row["refusal"]
            xs.append(place * 1.03**index)
            ys.append(100 * rate["value"])
            up = (100 * rate["low"], 100 * rate["high"])
            style.point(panel, xs[-1], ys[-1], tint, up=up, hollow=name.startswith("random"))
        panel.plot(xs, ys, color=tint, lw=1, ls=":" if name.startswith("random") else "-", zorder=1)
        ends.append((xs[-1], ys[-1], name, tint))
    panel.set_xscale("log", base=2)
    panel.set_xticks(places, [f"{place:g}" if place >= 1 else f"1/{1 / place:.0f}" for place in places])
    panel.minorticks_off()
    panel.set_ylim(-3, 103)
    panel.set_xlabel(axis)
    panel.set_ylabel("refusal, %")
    panel.grid(axis="y")
    return ends


def report(out: Path = RESULTS, docs: Path | None = DOCS) -> None:
    """Write the picture next to the results, and the sections of the page.

    Raises:
        DataError: no results, or a page without markers. Nothing is written then.
    """
    _, rows = read(out / f"{BENCHMARK}.jsonl", BENCHMARK)
    pages = {} if docs is None else written(SECTIONS, out, docs)
    picture = save_png(rows, out / f"{BENCHMARK}.png")
    write(pages)
    print(f"wrote {picture} ({len(rows)} cells)" + "".join(f" and the sections of {page}" for page in pages))
