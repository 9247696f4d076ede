"""One style for all pictures: the same color for the same method, direct labels, 95 % intervals, legible at 600 px.

Every picture is a light panel of one width, with a border: it looks the same on a light page and on a dark one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from pathlib import Path
from textwrap import wrap
from typing import Any

from peft_safety.errors import ArtifactError, ConfigError, extra

METHODS = {
    "other": ("#707070", r"unaligned|lora-fa|not blind|^task-"),
    "aligned": ("#222222", r"^(aligned|before|unpatched)"),
    "data": ("#882255", r"^lora-(mixed|screened|flagged|anchor)|safety data|(screen|anchor).*plain lora"),
    "guardspace": ("#0072B2", r"guard|frozen|window|blind|chain|both-sides"),
    "salora": ("#CC79A7", r"salora"),
    "safe_lora": ("#009E73", r"safe[ _-]?lora|^repaired"),
    "patch": ("#E69F00", r"patch|stacked|^(none|hard|soft)\b|^first of two|^second alone"),
    "somf": ("#56B4E9", r"somf"),
    "lora": ("#D55E00", r"lora|scaled"),
}
"""Method -> its color, and what its names hold; the first that fits. The colors are Okabe and Ito's, safe for
color-blind readers, with one of Tol's ("data": defenses that change the training data) and two grays.
"""
CONTROL = re.compile(r"random|scaled|control|at the (same )?norm", re.IGNORECASE)
"""In the name of a control. Controls have their method's color and are hollow."""
PANEL, INK, MUTED, GRID, HATCH = "#F8F8F5", "#222222", "#5F5F5F", "#E1E1DB", "#C4C4BC"
"""Colors of the panel, of text, of notes, of grid lines, and of the hatching where there is no figure."""
CONTRAST = 4.5
"""Of text and panel at least (WCAG 2.2, AA)."""
WIDTH, NARROW = 6.0, 4.0
"""Inches of a picture, and of one for small screens too: it has less in it, and text of the same points is larger."""
PIXELS = 1200
"""Of the width of every picture: twice that at which a page shows it."""
SMALLEST = 8.0
"""Points of the smallest text: 11 px where a picture is 600 px wide, a narrow one 400 px."""
TITLE_COLUMNS, NOTE_COLUMNS = 74 / WIDTH, 98 / WIDTH
"""Characters of an inch of the title, and of the notes."""
RC: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": SMALLEST,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.labelsize": SMALLEST,
    "xtick.labelsize": SMALLEST,
    "ytick.labelsize": SMALLEST,
    "figure.facecolor": PANEL,
    "figure.edgecolor": "#CFCFC8",
    "axes.facecolor": PANEL,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "hatch.linewidth": 0.7,
    "text.parse_math": False,  # dollar signs in names are no formulas
}


def method_of(name: str) -> str:
    """The method that a name stands for, a key of `METHODS`: of an arm, a control, or an entry of a benchmark."""
    own = re.sub(r"^(random|scaled):", "", name)
    return next((method for method, (_, words) in METHODS.items() if re.search(words, own.lower())), "other")


def color_of(name: str) -> str:
    return METHODS[method_of(name)][0]


def is_control(name: str) -> bool:
    return CONTROL.search(name) is not None


def luminance(color: str) -> float:
    """Relative luminance of "#RRGGBB" (WCAG 2.2)."""
    values = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
    return sum(weight * v for weight, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def ink(color: str) -> str:
    """A color for text: darkened until it is legible on the panel."""
    while (luminance(PANEL) + 0.05) / (luminance(color) + 0.05) < CONTRAST:
        color = "#" + "".join(f"{int(0.95 * int(color[i : i + 2], 16)):02X}" for i in (1, 3, 5))
    return color


def ramp(*colors: str) -> Any:
    """A color scale through these colors, for a heat map; no figure is gray."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("ramp", colors).with_extremes(bad=GRID)


def require_matplotlib() -> None:
    """A MissingPackageError where matplotlib is not installed."""
    with extra("plot", "pictures need matplotlib"):
        import matplotlib.figure  # noqa: F401


def check_png(path: str | Path) -> None:
    """Before the work that a picture shows: a typed error where it could not be drawn, or not written as PNG."""
    require_matplotlib()
    if Path(path).suffix.lower() != ".png":
        raise ConfigError(f"{path}: pictures are PNG files. Give a name that ends in .png.")
    from peft_safety.core import files  # with the libraries that it reads files by

    files.check_place(Path(path))


@contextmanager
def picture(
    path: str | Path,
    height: float,
    panels: int = 1,
    rows: int = 1,
    title: str = "",
    note: str = "",
    width: float = WIDTH,
    **options: Any,
) -> Iterator[tuple[Any, Any]]:
    """A figure and the array of its axes, in rows: drawn inside the `with`, saved as PNG behind it. `width`, and
    `height` of the axes' part, are in inches; title and note add their lines.
    """
    check_png(path)
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    heading = wrap(title, int(TITLE_COLUMNS * width))
    notes = [line for part in note.split("\n") for line in wrap(part, int(NOTE_COLUMNS * width))]
    with rc_context(RC):
        size = width, height + 0.18 * len(heading) + 0.15 * len(notes)
        canvas = Figure(size, layout="constrained", linewidth=2)
        canvas.get_layout_engine().set(w_pad=0.08, h_pad=0.08)  # type: ignore[union-attr,call-arg]
        axes = canvas.subplots(rows, -(-panels // rows), squeeze=False, **options).flatten()
        for unused in axes[panels:]:
            unused.remove()
        if heading:
            canvas.suptitle("\n".join(heading), x=0.02, ha="left", fontsize=9.5, fontweight="bold")
        if notes:
            canvas.supxlabel("\n".join(notes), x=0.02, ha="left", fontsize=SMALLEST, color=MUTED)
        yield canvas, axes[:panels]
        save(canvas, Path(path))


def save(canvas: Any, path: Path) -> None:
    """As PNG with a palette of 256 colors, which makes the file three times smaller."""
    from PIL import Image

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        canvas.savefig(path, dpi=PIXELS / canvas.get_figwidth(), format="png", metadata={"Software": None})
        with Image.open(path) as image:
            small = image.convert("RGB").quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
        small.save(path, format="png", optimize=True)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be written: {error}. Give another place.") from error


Interval = tuple[float, float]


def point(
    panel: Any,
    x: float,
    y: float,
    color: str,
    across: Interval | None = None,
    up: Interval | None = None,
    hollow: bool = False,
    marker: str = "o",
) -> None:
    """A value with the ends of its intervals, horizontal and vertical."""
    line = {"color": color, "lw": 1.0 if hollow else 1.8, "alpha": 0.35 if hollow else 0.45, "zorder": 2}
    if across is not None:
        panel.plot(across, (y, y), solid_capstyle="round", **line)
    if up is not None:
        panel.plot((x, x), up, solid_capstyle="round", **line)
    face, edge = (PANEL, color) if hollow else (color, PANEL)
    width, size, order = (1.2, 5.5, 3) if hollow else (0.6, 11, 5) if marker == "*" else (0.6, 7, 4)
    panel.plot(x, y, marker, ms=size, mfc=face, mec=edge, mew=width, zorder=order, clip_on=False)


def whisker(panel: Any, y: float, ends: Interval) -> None:
    """An interval on a horizontal bar of any color."""
    for color, width in ((PANEL, 3.2), (INK, 1.2)):
        panel.plot(ends, (y, y), color=color, lw=width, solid_capstyle="butt", zorder=3)


def bar(
    panel: Any,
    y: float,
    value: float,
    color: str,
    ends: Interval,
    text: str = "",
    height: float = 0.7,
    beside: float = 0.0,
) -> None:
    """A horizontal bar with its interval; the text to the right of both, and of `beside`."""
    panel.barh(y, value, color=color, height=height)
    if ends[0] < ends[1]:
        whisker(panel, y, ends)
    if text:
        panel.annotate(text, (max(value, ends[1], beside), y), (5, 0), textcoords="offset points", va="center")


MIDDLE = 0.22
"""Luminance of a cell below which its figure is light."""
Label = tuple[float, float, str, str]
"""x and y of a point, the text, and the point's color."""
LEVEL = 0.01
"""Points are of equal height if they differ by less of the axis."""


def label_points(panel: Any, labels: Sequence[Label]) -> None:
    """Names in a column to the right, each with a line to its point, and none on another. Call it last: it lays the
    figure out, whose panels must not shrink afterwards.
    """
    order: list[Label] = []  # from below
    for run in _runs(labels, LEVEL * abs(panel.get_ylim()[1] - panel.get_ylim()[0])):
        order += run[::2] + run[1::2][::-1]  # the lines of points to the left pass around those to the right
    panel.figure.draw_without_rendering()
    box = panel.get_window_extent()
    to_axes = (panel.transData - panel.transAxes).transform
    tall = [1.22 * SMALLEST / 72 * panel.figure.dpi * (1 + text.count("\n")) / box.height for _, _, text, _ in order]
    wanted = [to_axes((x, y))[1] for x, y, *_ in order]
    places = spread(wanted, [(a + b) / 2 for a, b in pairwise(tall)], 0.0, 1.0)
    line = {"arrowstyle": "-", "lw": 0.7, "alpha": 0.6, "shrinkA": 1, "shrinkB": 3, "relpos": (0, 0.5)}
    for (x, y, text, color), place in zip(order, places, strict=True):
        how = {"xycoords": "data", "textcoords": "axes fraction", "va": "center", "ha": "left", "linespacing": 1.0}
        panel.annotate(text, (x, y), (1.04, place), color=ink(color), arrowprops={**line, "color": color}, **how)


def _runs(labels: Sequence[Label], near: float) -> list[list[Label]]:
    """From below: points of about equal height, from left to right."""
    runs: list[list[Label]] = []
    for one in sorted(labels, key=lambda one: one[1]):
        if runs and one[1] - runs[-1][-1][1] < near:
            runs[-1].append(one)
        else:
            runs.append([one])
    return [sorted(run, key=lambda one: one[0]) for run in runs]


def heat(panel: Any, values: Sequence[Sequence[float]], form: str, low: float, high: float, *colors: str) -> None:
    """A heat map with its figures in the cells; those without a figure (NaN) are hatched."""
    from matplotlib.colors import Normalize, to_hex

    scale, norm = ramp(*colors).with_extremes(bad=(0, 0, 0, 0)), Normalize(low, high, clip=True)
    panel.patch.set(facecolor=PANEL, edgecolor=HATCH, hatch="////")
    panel.imshow(values, cmap=scale, norm=norm, aspect="auto")
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            if not math.isnan(value):
                dark = luminance(to_hex(scale(norm(value)))) < MIDDLE
                text = {"ha": "center", "va": "center", "color": PANEL if dark else INK}
                panel.text(x, y, format(value, form), **text)
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)


def spread(wanted: Sequence[float], gaps: Sequence[float], low: float, high: float) -> list[float]:
    """Places in rising order between `low` and `high`, as near to the wanted ones as `gaps` between neighbors let them
    be (least squares); the gaps shrink where there is no room.
    """
    shrink = min(1.0, (high - low) / sum(gaps)) if any(gaps) else 1.0
    offsets = list(accumulate((shrink * gap for gap in gaps), initial=0.0))
    blocks: list[tuple[float, int]] = []  # mean place less offset, and members: pooled where they would not rise
    for place, offset in zip(wanted, offsets, strict=False):
        mean, count = place - offset, 1
        while blocks and blocks[-1][0] > mean:
            before, members = blocks.pop()
            mean, count = (before * members + mean * count) / (members + count), members + count
        blocks.append((mean, count))
    first = [mean for mean, count in blocks for _ in range(count)]
    return [offset + min(max(mean, low), high - offsets[-1]) for mean, offset in zip(first, offsets, strict=False)]
