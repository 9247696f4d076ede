"""Results of several arms, rendered as a table, as JSON, as a PNG, or as a section of a model card."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_safety.core.environment import environment
from peft_safety.errors import DataError
from peft_safety.evaluation.metrics import Figure, Rate, figure_from_json
from peft_safety.reporting.render import save_figure

if TYPE_CHECKING:
    from rich.console import Group

__all__ = ["MISSING", "Report", "environment"]
MISSING = "-"
WIDTH = 80
"""Columns of a terminal that a printed table fits."""


@dataclass(frozen=True)
class Report:
    """Arms by metrics, each figure with its N and interval.

    Attributes:
        title: one line.
        arms: name of an arm (a row) -> heading of a metric (a column) -> figure; an arm may lack a metric.
        notes: sentences that a reader of the figures needs: the judge and its caveat, the split, what did not work.
        environment: see `environment`.
        details: further plain JSON values, kept only in the JSON rendering.
    """

    title: str
    arms: Mapping[str, Mapping[str, Figure]]
    notes: tuple[str, ...] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.arms or not self.metrics:
            raise DataError(f"report {self.title!r} has no figures. Give at least one arm with one metric.")

    @property
    def metrics(self) -> list[str]:
        """The headings of all arms, in order of first appearance."""
        return list(dict.fromkeys(metric for figures in self.arms.values() for metric in figures))

    def rows(self) -> list[list[str]]:
        """One row of text an arm: its name, then each figure as `value [low, high]`."""
        return [
            [arm, *(str(figures[metric]) if metric in figures else MISSING for metric in self.metrics)]
            for arm, figures in self.arms.items()
        ]

    def headings(self) -> list[str]:
        """Column headings: empty, then each metric with its N (`N=a-b` where arms differ)."""
        return ["", *(f"{metric} (N={self._sizes(metric)})" for metric in self.metrics)]

    def table(self) -> Group:
        """As rich tables of at most `WIDTH` columns, with the notes below: a metric a row, and as many arms side by
        side as fit.

        The first arm is the reference, and is repeated in each table.
        """
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        names = list(self.arms)
        label = max(map(len, self.metrics))
        widths = {
            name: max(len(name), *(len(_short(figure)) for figure in self.arms[name].values())) for name in names
        }
        room = WIDTH - label - max(len(self._sizes(metric)) for metric in self.metrics) - 4
        parts: list[Any] = [Text(self.title, style="italic")]
        for chosen in _fitting(names, {name: width + 2 for name, width in widths.items()}, room):
            table = Table("", "N", *chosen, box=None, padding=(0, 2, 0, 0), header_style="bold")
            for column in table.columns[1:]:
                column.justify, column.no_wrap = "right", True
            for metric in self.metrics:
                cells = (_short(self.arms[name][metric]) if metric in self.arms[name] else MISSING for name in chosen)
                table.add_row(metric, self._sizes(metric), *cells)
            parts += [table, ""]
        return Group(*parts, *(Text(note, style="dim") for note in (*self.notes, "Brackets: 95 % intervals.")))

    def print(self) -> None:
        """Print the table to stdout."""
        from rich.console import Console

        console = Console(width=min(Console().width, WIDTH))
        console.print(self.table())

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` reads them back."""
        return {
            "title": self.title,
            "arms": {
                arm: {metric: figure.to_json() for metric, figure in figures.items()}
                for arm, figures in self.arms.items()
            },
            "notes": list(self.notes),
            "environment": dict(self.environment),
            "details": dict(self.details),
        }

    @classmethod
    def from_json(cls, data: Any) -> Report:
        """The report that `to_json` wrote.

        Raises:
            DataError: malformed.
        """
        try:
            arms = {
                str(arm): {str(metric): figure_from_json(figure) for metric, figure in figures.items()}
                for arm, figures in data["arms"].items()
            }
            return cls(
                str(data["title"]),
                arms,
                tuple(map(str, data["notes"])),
                dict(data["environment"]),
                dict(data["details"]),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise DataError(
                f"not a report ({type(error).__name__}: {error}). Give a report.json that peft-safety wrote."
            ) from error

    def save(self, path: str | Path) -> Path:
        """Write the JSON rendering."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Read a report that `save` wrote.

        Raises:
            DataError: missing, not JSON, or no report.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(f"cannot read {path}: {error}. Give a report.json that peft-safety wrote.") from error
        return cls.from_json(data)

    def card(self) -> str:
        """A Markdown section for a model card."""
        table = [self.headings(), ["---"] + ["---:"] * len(self.metrics), *self.rows()]
        lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table]
        setting = ", ".join(f"{key} {value}" for key, value in self.environment.items())
        return "\n".join(
            [
                f"## {self.title}",
                "",
                *lines,
                "",
                "Brackets: 95 % intervals.",
                *(f"- {note}" for note in self.notes),
                f"- Environment: {setting}.",
                "",
            ]
        )

    def save_png(self, path: str | Path) -> Path:
        """One panel per metric, one point with its interval per arm; rates from 0 to 100 %."""
        from matplotlib.figure import Figure as Canvas

        metrics, names = self.metrics, list(self.arms)
        height = 1.6 + 0.42 * len(names)
        canvas = Canvas(figsize=(1.6 + 2.5 * len(metrics), height), layout="constrained")
        panels = canvas.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
        for panel, metric in zip(panels, metrics, strict=True):
            self._draw(panel, metric)
        panels[0].set_yticks(range(len(names)), names)
        panels[0].set_ylim(len(names) - 0.5, -0.5)
        canvas.suptitle(self.title, fontsize=11)
        canvas.text(0.01, -0.01, "\n".join((*self.notes, "Bars: 95 % intervals.")), fontsize=7, va="top", color="0.35")
        return save_figure(canvas, path, bbox_inches="tight", pad_inches=0.15)

    def _draw(self, panel: Any, metric: str) -> None:
        """Points and intervals of one metric on matplotlib axes."""
        for row, (figures, color) in enumerate(zip(self.arms.values(), _colors(len(self.arms)), strict=True)):
            if metric not in figures:
                continue
            figure = figures[metric]
            scale = 100 if isinstance(figure, Rate) else 1
            low, high = (scale * bound for bound in figure.interval)
            value = scale * figure.value
            if high < float("inf"):
                panel.plot([low, high], [row, row], color=color, linewidth=3, alpha=0.45, solid_capstyle="round")
            panel.plot([value], [row], "o", color=color, markersize=7)
            panel.annotate(
                f"{value:.0f}" if scale == 100 else f"{value:.2f}",
                (value, row),
                (0, 7),
                textcoords="offset points",
                ha="center",
                fontsize=7,
            )
        rates = any(isinstance(figures.get(metric), Rate) for figures in self.arms.values())
        if rates:
            panel.set_xlim(-6, 106)
        panel.set_title(f"{metric}\nN={self._sizes(metric)}", fontsize=8)
        panel.set_xlabel("%" if rates else "nats per token", fontsize=7)
        panel.tick_params(labelsize=8)
        panel.grid(axis="x", color="0.9")
        panel.spines[["top", "right"]].set_visible(False)

    def _sizes(self, metric: str) -> str:
        sizes = sorted({figures[metric].n for figures in self.arms.values() if metric in figures})
        return str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]}-{sizes[-1]}"


def _short(figure: Figure) -> str:
    """A rate with its interval; a mean with half of it."""
    if isinstance(figure, Rate) or not math.isfinite(figure.interval[1]):
        return str(figure)
    return f"{figure.value:.2f} ± {figure.interval[1] - figure.value:.2f}"


def _fitting(names: list[str], widths: Mapping[str, int], room: int) -> list[list[str]]:
    """Groups of names that fit side by side. Every group starts with the first name."""
    first, *others = names
    groups = [[first]]
    for name in others:
        if len(groups[-1]) > 1 and sum(widths[member] for member in groups[-1]) + widths[name] > room:
            groups.append([first])
        groups[-1].append(name)
    return groups


def _colors(n: int) -> list[str]:
    """Color-blind safe (Okabe and Ito), repeated beyond eight."""
    palette = ("#555555", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#882255")
    return [palette[index % len(palette)] for index in range(n)]
