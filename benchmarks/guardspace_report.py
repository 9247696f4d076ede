"""Renders results/guardspace.jsonl: a section of docs/results.md, the grid in docs/guardspace.md, and a picture."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, with_section
from benchmarks.frontier.aggregate import pooled
from benchmarks.frontier.cells import caveats
from benchmarks.frontier.results import Row, read

ROOT = Path(__file__).resolve().parents[1]
MARKERS = ("<!-- guardspace:begin -->", "<!-- guardspace:end -->")
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
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#555555")


def share(rows: Sequence[Row], metric: str) -> str:
    """A rate over all seeds, or why there is none."""
    found = pooled(rows, metric)
    return str(found) if found else "diverged" if any("diverged" in row for row in rows) else "-"


def norms(rows: Sequence[Row]) -> str:
    """Mean kept norm."""
    found = [row["norm"] for row in rows if "norm" in row]
    return f"{statistics.mean(found):.2f}" if found else "-"


def table(rows: Sequence[Row], label: Callable[[Row], tuple[str, ...]], headings: Sequence[str]) -> list[str]:
    """Markdown: one line for each label, seeds pooled."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(label(row), []).append(row)
    lines = [
        "| " + " | ".join([*headings, *METRICS.values(), "norm of dW", "seeds"]) + " |",
        "| " + " | ".join(["---"] * len(headings) + ["---:"] * 6) + " |",
    ]
    for names, group in groups.items():
        cells = [*names, *(share(group, metric) for metric in METRICS), norms(group), str(len(group))]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def markdown(environment: dict[str, Any], rows: Sequence[Row]) -> str:
    """The section between the markers."""
    tests = sorted((row for row in rows if row["cell"]["split"] == "test"), key=lambda row: row["cell"]["poison"])
    grid = [row for row in rows if row["cell"]["split"] == "validation"]
    lines = ["![refusal against optimizer steps and against the size of the null space](guardspace.png)", ""]
    if tests:
        basis, fraction, positions = environment["chosen"]
        lines += [
            f"Test prompts, once, for the setting chosen on validation prompts: basis {basis!r}, {fraction:g} of the "
            f"dimensions, {positions} positions.",
            "",
        ]
        lines += [*table(tests, lambda row: (_poison(row), _arm(row)), ["poison", "arm"]), ""]
        lines += _transfer(tests)
    else:
        lines += ["The setting has not been chosen yet: nothing here is from test prompts.", ""]
    lines += [
        f"The {len(grid)} cells on validation prompts, among them where it stops: [guardspace.md](guardspace.md).",
        "",
    ]
    facts = ", ".join(
        f"{key} {value}" for key, value in environment.items() if key not in ("chosen", "sets") and value != ""
    )
    caveat = "Keyword judge, a smoke metric; brackets are 95 % intervals over prompts, pooled over seeds."
    older = [f"- **{known}**" for known in caveats(environment)]
    return "\n".join(
        [
            *lines,
            *older,
            f"- {caveat}",
            f"- Environment: {facts}.",
            "- Written by `python -m benchmarks.guardspace --report`.",
            "",
        ]
    )


def grid_page(environment: dict[str, Any], rows: Sequence[Row]) -> str:
    """docs/guardspace.md: every cell on validation prompts, and refusal along the long fine-tunes."""
    grid = [row for row in rows if row["cell"]["split"] == "validation"]
    lines = [
        "# GuardSpace: the grid on validation prompts",
        "",
        "Written by `python -m benchmarks.guardspace --report`; keyword judge, 95 % intervals.",
        "",
    ]
    lines += [text for caveat in caveats(environment) for text in (f"**{caveat}**", "")]
    lines += table(grid, _setting, ["arm", "basis, share, positions", "poison", "epochs", "lr", "calibration"])
    long = [row for row in grid if row.get("along")]
    if long:
        steps = sorted({int(step) for row in long for step in row["along"]} | {row["steps"] for row in long})
        lines += ["", "## Refusal along a long fine-tune, % after so many steps", ""]
        lines += [
            "| arm | basis, share, positions | " + " | ".join(map(str, steps)) + " |",
            "| --- | --- | " + " | ".join(["---:"] * len(steps)) + " |",
        ]
        for row in long:
            reached = {step: f"{100 * found['refusal']['value']:.0f}" for step, found in along(row)}
            lines.append("| " + " | ".join([*_setting(row)[:2], *(reached.get(step, "-") for step in steps)]) + " |")
    return "\n".join(lines) + "\n"


def along(row: Row) -> list[tuple[int, Row]]:
    """What was measured after how many steps, the end last."""
    return [*((int(step), found) for step, found in row.get("along", {}).items()), (row.get("steps", 0), row)]


def _kind(row: Row) -> str:
    return row["cell"]["control"] or row["cell"]["arm"]


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
    """Refusal on other prompt sets, poison 0.1."""
    names = sorted({name for row in tests for name in row.get("transfer", {})})
    if not names:
        return []
    lines = [
        "Refusal on other prompt sets, with 0.1 poison:",
        "",
        "| arm | " + " | ".join(names) + " |",
        "| --- | " + " | ".join(["---:"] * len(names)) + " |",
    ]
    for arm, label in ARMS.items():
        rows = [row for row in tests if _kind(row) == arm and (arm == "aligned" or row["cell"]["poison"] == 0.1)]
        if rows:
            cells = [share([row["transfer"] for row in rows if "transfer" in row], name) for name in names]
            lines.append("| " + " | ".join([label, *cells]) + " |")
    return [*lines, ""]


def save_png(rows: Sequence[Row], path: Path) -> Path:
    """Left: refusal against steps, a line a size of the null space, and plain LoRA. Right: refusal against that size,
    a line a basis. Poison 0.1.
    """
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(10, 5), layout="constrained")
    left, right = canvas.subplots(1, 2, sharey=True)
    finite = [row for row in rows if "refusal" in row]
    usual = [
        row
        for row in finite
        if row["cell"]["split"] == "validation" and row["cell"]["poison"] == 0.1 and row["cell"]["lr"] == 1e-3
    ]
    lines: dict[str, list[tuple[float, Row]]] = {}
    for row in usual:
        cell = row["cell"]
        if cell["arm"] == "lora" or (
            _kind(row) == "guard" and cell["positions"] == "all" and cell["calibration"] == 64
        ):
            name = (
                f"plain LoRA, {cell['epochs']} epochs"
                if cell["arm"] == "lora"
                else f"{cell['basis']}, {cell['fraction']:.3g}, {cell['epochs']} epochs"
            )
            lines.setdefault(name, []).extend(along(row) if row.get("along") else [])
    _draw(left, {name: points for name, points in lines.items() if points}, "optimizer steps")
    sizes: dict[str, list[tuple[float, Row]]] = {}
    for row in usual:
        cell = row["cell"]
        if (
            _kind(row) in ("guard", "random")
            and cell["positions"] == "all"
            and cell["calibration"] == 64
            and cell["epochs"] == 1
        ):
            sizes.setdefault("random" if cell["control"] else cell["basis"], []).append((cell["fraction"], row))
    _draw(right, sizes, "share of the input dimensions taken")
    left.set_ylabel("refusal, % of harmful validation prompts")
    canvas.suptitle("GuardSpace, one row in ten poisoned", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path, dpi=150, format="png")
    return path


def _draw(panel: Any, lines: dict[str, list[tuple[float, Row]]], axis: str) -> None:
    """Lines with 95 % intervals; each is moved by a hair, so that equal figures stay visible."""
    places = sorted({place for points in lines.values() for place, _ in points})
    for index, (name, points) in enumerate(lines.items()):
        points = sorted(points, key=lambda point: point[0])
        x, rates = [place * 1.06**index for place, _ in points], [row["refusal"] for _, row in points]
        bars = [
            [max(0.0, 100 * (end * (rate[edge] - rate["value"]))) for rate in rates]
            for end, edge in ((-1, "low"), (1, "high"))
        ]
        style = {
            "fmt": ("o-", "s--")[index // len(COLOURS) % 2],
            "color": COLOURS[index % len(COLOURS)],
            "capsize": 2,
            "elinewidth": 1,
        }
        panel.errorbar(x, [100 * rate["value"] for rate in rates], yerr=bars, label=name, **style)
    panel.set_xscale("log", base=2)
    panel.set_xticks(places, [f"{place:g}" if place >= 1 else f"1/{1 / place:.0f}" for place in places])
    panel.minorticks_off()
    panel.set_ylim(-3, 103)
    panel.set_xlabel(axis)
    panel.grid(color="0.92")
    panel.spines[["top", "right"]].set_visible(False)
    if lines:
        panel.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(0, -0.14), ncols=2)


def report(
    results: Path = RESULTS / "guardspace.jsonl",
    page: Path = ROOT / "docs" / "results.md",
    png: Path = ROOT / "docs" / "guardspace.png",
) -> None:
    """Write the section, the picture, and the grid's page beside the picture.

    Raises:
        DataError: no results, or no markers in the page.
    """
    environment, rows = read(results, "guardspace")
    begin, end = MARKERS
    page.write_text(with_section(page, MARKERS, f"{begin}\n{markdown(environment, rows)}{end}"), encoding="utf-8")
    png.with_suffix(".md").parent.mkdir(parents=True, exist_ok=True)
    png.with_suffix(".md").write_text(grid_page(environment, rows), encoding="utf-8")
    print(f"wrote {save_png(rows, png)} and the section of {page} ({len(rows)} cells)")
