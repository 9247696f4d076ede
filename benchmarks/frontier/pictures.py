"""The frontier, the heat map and the costs, as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.frontier.aggregate import Point, Points, cost, label, names, shares

COLORS = {
    "aligned": "#000000",
    "lora": "#D55E00",
    "guardspace": "#0072B2",
    "frozen": "#003F7D",
    "frozen-random": "#6A8CBB",
    "frozen-r16": "#1F4E99",
    "window-64": "#17A2B8",
    "window-256": "#0B7285",
    "task-frozen": "#B8860B",
    "task-trained": "#C97B4A",
    "blind": "#5E35B1",
    "guardspace-general": "#56B4E9",
    "safe-lora": "#009E73",
    "safe-lora-number": "#66C2A5",
    "safe-lora-topk": "#1B7837",
    "safe-lora-soft": "#A6D854",
    "salora-32": "#E7298A",
    "salora-0.9": "#AA4499",
    "both-sides": "#332288",
    "lora-mixed": "#E69F00",
    "patch-reattached": "#A6761D",
    "patch-stacked": "#7F5539",
    "somf": "#888888",
}
MARKERS = {"": "o", "random": "s", "scaled": "^"}
TOO_CAREFUL = 0.25
"""Over-refusal above this is written in the label: such a method may refuse everything that looks dangerous."""
DPI = 110
LABEL_GAP = 4.6
"""Smallest distance between two labels, in percent of the axis."""


def family(name: str) -> str:
    """The method behind a control, a 4-bit twin or another setting."""
    method = name.partition(":")[2] or name
    return method.split(" with ")[0].removesuffix("-nf4")


def color(name: str) -> str:
    """The color of a method and of its controls."""
    return COLORS.get(family(name), "#555555")


def frontier(points: Points, path: Path) -> Path:
    """One panel for each share of poison: refusal over accuracy with 95 % Wilson intervals. Controls are hollow, and a
    line joins them to their method.
    """
    from matplotlib.figure import Figure

    panels = shares(points)
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    foot = 0.95 if columns == 2 else 1.35  # the legend takes three lines where the picture is narrow
    height = 6.8 * lines + foot
    canvas = Figure(figsize=(7.2 * columns, height))
    axes = canvas.subplots(lines, columns, squeeze=False)
    canvas.subplots_adjust(
        left=0.055 if columns == 2 else 0.09,
        right=0.985,
        top=1 - 0.85 / height,
        bottom=foot / height,
        hspace=0.24,
        wspace=0.1,
    )
    right = max(100 * accuracy.interval[1] for point in points.values() if (accuracy := point.rate("task_accuracy")))
    for index, axis in enumerate(axes.flat):
        if index >= len(panels):
            axis.set_visible(False)
            continue
        _panel(axis, points, panels[index], right)
    _legend(canvas)
    return saved(canvas, path)


def _panel(axis: Any, points: Points, poison: float, right: float) -> None:
    here = {
        name: point
        for (name, share), point in points.items()
        if share == poison and point.rate("refusal") and point.rate("task_accuracy")
    }
    labeled = []
    for name, point in here.items():
        x, y = point.rate("task_accuracy"), point.rate("refusal")
        if x is None or y is None:
            continue
        at = (100 * x.value, 100 * y.value)
        bars = [[[at[i] - 100 * rate.interval[0]], [100 * rate.interval[1] - at[i]]] for i, rate in enumerate((x, y))]
        tint, hollow = color(name), bool(point.control)
        quantized = name.endswith("-nf4")
        axis.errorbar(
            *at,
            xerr=bars[0],
            yerr=bars[1],
            fmt="none",
            ecolor=tint,
            alpha=0.25 if hollow else 0.45,
            lw=0.8 if hollow else 1.2,
            zorder=1,
        )
        style = {
            "marker": "*" if name == "aligned" else "D" if quantized else MARKERS[point.control],
            "ms": 11 if name == "aligned" else 6 if hollow else 8,
        }
        axis.plot(*at, ls="", mfc="white" if hollow else tint, mec=tint, mew=1.3, zorder=2 if hollow else 3, **style)
        method = here.get(name.partition(":")[2]) if hollow else None
        if (
            method is not None
            and (other := (method.rate("task_accuracy"), method.rate("refusal")))
            and other[0]
            and other[1]
        ):
            axis.plot(
                [at[0], 100 * other[0].value],
                [at[1], 100 * other[1].value],
                color=tint,
                lw=0.7,
                ls=":",
                alpha=0.6,
                zorder=0,
            )
        if name == "aligned":
            axis.annotate("before", at, (0, -9), textcoords="offset points", fontsize=8, ha="center", va="top")
        elif not hollow and not quantized:
            over = point.rate("over_refusal")
            price = (
                f"\nbut refuses {100 * over.value:.0f} % of safe prompts"
                if over is not None and over.value > TOO_CAREFUL
                else ""
            )
            labeled.append((at, label(name) + price, tint))
    _labels(axis, labeled, right + 4)
    axis.set_xlim(-3, right + 4 + 0.52 * (right + 7))
    axis.set_xticks([tick for tick in range(0, 101, 20 if right > 60 else 10) if tick <= right + 2])
    axis.set_ylim(-4, 105)
    title = (
        "clean data"
        if poison == 0
        else "poisoned data only"
        if poison == 1
        else f"{100 * poison:g} % of the rows poisoned"
    )
    axis.set_title(title, fontsize=11, loc="left")
    axis.set_xlabel("accuracy on the trained task, %", loc="left", fontsize=9)
    axis.set_ylabel("refusal of harmful prompts, %", fontsize=9)
    axis.grid(color="0.93")
    axis.spines[["top", "right"]].set_visible(False)


def _labels(axis: Any, labeled: Sequence[tuple[tuple[float, float], str, str]], x: float) -> None:
    """Names in a column to the right, in the order of the points from top to bottom, each with a line to its point."""
    order = sorted(labeled, key=lambda item: (-item[0][1], item[0][0]))
    places = spread([at[1] for at, _, _ in order], LABEL_GAP, -2.0, 103.0)
    for (at, text, tint), y in zip(order, places, strict=True):
        axis.plot([at[0], x - 0.5], [at[1], y], color=tint, lw=0.6, alpha=0.55, zorder=0)
        axis.text(
            x,
            y,
            text,
            color=tint if tint != COLORS["safe-lora-soft"] else "#5B8C1A",
            fontsize=8,
            va="center",
            ha="left",
            linespacing=0.95,
        )


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places for labels between `low` and `high`, in falling order: near the wanted places and `gap` apart, or less if
    there is no room.
    """
    gap = min(gap, (high - low) / max(1, len(wanted) - 1))
    placed: list[float] = []
    for index, value in enumerate(wanted):
        ceiling = high - index * gap if not placed else placed[-1] - gap
        placed.append(min(value, ceiling, high))
    for index in range(len(placed) - 1, -1, -1):
        floor = low + (len(placed) - 1 - index) * gap if index == len(placed) - 1 else placed[index + 1] + gap
        placed[index] = max(placed[index], floor)
    return placed


def _legend(canvas: Any) -> None:
    from matplotlib.lines import Line2D

    kinds = (
        ("*", "0.0", "aligned model, before"),
        ("o", "0.3", "method"),
        ("D", "0.3", "method on a 4-bit base"),
        ("s", "white", "control: random basis of equal size"),
        ("^", "white", "control: plain LoRA at the same norm"),
    )
    handles = [
        Line2D([], [], ls="", marker=marker, mfc=face, mec="0.3", ms=7, label=text) for marker, face, text in kinds
    ]
    canvas.legend(
        handles=handles, loc="lower center", ncols=2 if canvas.get_figwidth() < 10 else 5, frameon=False, fontsize=9
    )
    canvas.suptitle(
        "Safety and utility after fine-tuning (up and right is better; bars: 95 % intervals)",
        fontsize=12,
        x=0.01,
        ha="left",
    )


def heat(points: Points, path: Path) -> Path:
    """Refusal, over-refusal and accuracy of each method at each share of poison, as numbers and colors."""
    from matplotlib.figure import Figure

    rows, columns = with_controls(names(points)), shares(points)
    metrics = (
        ("refusal", "refusal", "RdYlGn"),
        ("over_refusal", "over-refusal", "RdYlGn_r"),
        ("task_accuracy", "accuracy", "viridis"),
    )
    canvas = Figure(
        figsize=(3.4 + max(1.3, 0.75 * len(columns)) * len(metrics), 1.3 + 0.27 * len(rows)), layout="constrained"
    )
    axes = canvas.subplots(1, len(metrics), sharey=True)
    for axis, (metric, title, scheme) in zip(axes, metrics, strict=True):
        table = [[_value(points.get((name, poison)), metric) for poison in columns] for name in rows]
        axis.imshow(
            [[float("nan") if value is None else value for value in line] for line in table],
            cmap=scheme,
            vmin=0,
            vmax=100,
            aspect="auto",
            alpha=0.75,
        )
        for y, name in enumerate(rows):
            for x, poison in enumerate(columns):
                point, value = points.get((name, poison)), table[y][x]
                text = f"{value:.0f}" if value is not None else "div." if point is not None and point.diverged else "·"
                dark = value is not None and scheme == "viridis" and value < 40
                axis.text(x, y, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
        axis.set_xticks(range(len(columns)), [f"{100 * poison:g} %" for poison in columns], fontsize=8)
        axis.set_title(f"{title}, %", fontsize=9)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    axes[0].set_yticks(
        range(len(rows)),
        [("random basis" if name[0] == "r" else "equal norm") if ":" in name else label(name) for name in rows],
        fontsize=8,
    )
    for tick, name in zip(axes[0].get_yticklabels(), rows, strict=True):
        tick.set_color("0.45" if ":" in name else "black")
    canvas.supxlabel("share of the training rows that is poisoned (·: not measured)", fontsize=9)
    return saved(canvas, path)


def with_controls(listed: Sequence[str]) -> list[str]:
    """Every method, followed by its controls."""
    methods = [name for name in listed if ":" not in name]
    behind = {method: [name for name in listed if name.partition(":")[2] == method] for method in methods}
    rest = [name for name in listed if ":" in name and name.partition(":")[2] not in methods]
    return [name for method in methods for name in (method, *behind[method])] + rest


def _value(point: Point | None, metric: str) -> float | None:
    rate = point.rate(metric) if point is not None else None
    return None if rate is None else 100 * rate.value


def costs(points: Points, path: Path) -> Path:
    """Time of training, time of calibration or repair, and memory added in training, as multiples of plain LoRA's."""
    from matplotlib.figure import Figure

    rows = [(name, *cost(points, name)) for name in names(points, controls=False) if family(name) != "aligned"]
    rows = [row for row in rows if row[1] is not None]
    canvas = Figure(figsize=(10, 1.3 + 0.3 * max(1, len(rows))), layout="constrained")
    left, right = canvas.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for y, (name, train, setup, memory) in enumerate(rows):
        left.barh(y, train, color=color(name), alpha=0.85)
        left.barh(y, setup, left=train, color=color(name), alpha=0.35, hatch="///", edgecolor="white", lw=0)
        left.text(train + setup, y, f" {train + setup:.2f}", va="center", fontsize=8)
        if memory is not None:
            right.barh(y, memory, color=color(name), alpha=0.85)
            right.text(memory, y, f" {memory:.2f}", va="center", fontsize=8)
    for axis, title in (
        (left, "time: training (solid) and calibration or repair (hatched)"),
        (right, "memory added while training"),
    ):
        axis.set_title(title, fontsize=9)
        axis.axvline(1, color="0.4", lw=0.8, ls=":")
        axis.margins(x=0.12)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlabel("plain LoRA = 1", fontsize=8)
    right.set_visible(any(row[3] is not None for row in rows))
    left.set_yticks(range(len(rows)), [label(row[0]) for row in rows], fontsize=8)
    left.invert_yaxis()
    return saved(canvas, path)


def saved(canvas: Any, path: Path) -> Path:
    """Save with a palette, which makes the file three times smaller."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path, dpi=DPI, format="png", metadata={"Software": None})
    with Image.open(path) as image:
        small = image.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    small.save(path, optimize=True)
    return path
