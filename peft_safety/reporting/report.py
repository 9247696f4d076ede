"""Results of several arms, rendered as a table, as JSON, as a PNG, or as a section of a model card."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import wrap
from typing import Any

from peft_safety.core.environment import environment
from peft_safety.errors import ConfigError, DataError
from peft_safety.evaluation.metrics import Figure, Rate, figure_from_json
from peft_safety.reporting import render, style

__all__ = ["Report", "environment"]
MISSING = "-"
HEADING, ARM = 20, 24
"""Characters of a line above a panel, and of one beside it."""
PANELS = 3
"""Panels of a picture side by side."""
INTERVALS = "Brackets: 95 % intervals."


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
        return list(dict.fromkeys(metric for figures in self.arms.values() for metric in figures))

    def print(self) -> None:
        """Print tables of a metric a row to stdout, each with the first arm, the reference."""
        cells = {arm: {metric: _short(figure) for metric, figure in row.items()} for arm, row in self.arms.items()}
        sizes = {metric: self._sizes(metric) for metric in self.metrics}
        widths = {arm: max(map(len, [arm, *row.values()])) for arm, row in cells.items()}
        room = render.WIDTH - max(map(len, sizes.values())) - render.GAP
        first, *others = (width + render.GAP for width in widths.values())
        least = max(render.NARROWEST, room - first - max(others, default=0))
        names = {metric: _wrapped(metric, least) for metric in sizes}
        room -= max(len(line) for lines in names.values() for line in lines)
        tables = []
        for group in render.fitting(widths, room):
            rows = [
                ["\n".join(names[metric]), n, *(cells[arm].get(metric, MISSING) for arm in group)]
                for metric, n in sizes.items()
            ]
            tables.append(render.table(["", "N", *group], rows))
        render.show(self.title, *tables, notes=(*self.notes, INTERVALS))

    def to_json(self) -> dict[str, Any]:
        arms = {
            arm: {metric: figure.to_json() for metric, figure in figures.items()} for arm, figures in self.arms.items()
        }
        rest = {"notes": list(self.notes), "environment": dict(self.environment), "details": dict(self.details)}
        return {"title": self.title, "arms": arms, **rest}

    def save(self, path: str | Path) -> Path:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        return path

    def write(self, directory: Path) -> None:
        """`report.json` and `report.png` in a directory; without matplotlib a warning instead of the picture."""
        self.save(directory / "report.json")
        try:
            self.save_png(directory / "report.png")
        except ConfigError as error:
            warnings.warn(f"no report.png: {error}", stacklevel=2)

    @classmethod
    def load(cls, path: str | Path) -> Report:
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            arms = {
                str(arm): {str(metric): figure_from_json(figure) for metric, figure in figures.items()}
                for arm, figures in data["arms"].items()
            }
            notes = tuple(map(str, data["notes"]))
            return cls(str(data["title"]), arms, notes, dict(data["environment"]), dict(data["details"]))
        except (OSError, KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            problem = f"{path} is no report ({type(error).__name__}: {error})"
            raise DataError(f"{problem}. Give a report.json that peft-safety wrote.") from error

    def card(self) -> str:
        """A Markdown section for a model card: an arm a row, each metric with its N (`N=a-b` where arms differ)."""
        table = [["", *(f"{metric} (N={self._sizes(metric)})" for metric in self.metrics)]]
        table.append(["---"] + ["---:"] * len(self.metrics))
        table += [[arm, *(str(row.get(m, MISSING)) for m in self.metrics)] for arm, row in self.arms.items()]
        lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table]
        setting = ", ".join(f"{key} {value}" for key, value in self.environment.items())
        notes = [f"- {note}" for note in (*self.notes, f"Environment: {setting}.")]
        return "\n".join([f"## {self.title}", "", *lines, "", INTERVALS, *notes, ""])

    def save_png(self, path: str | Path) -> Path:
        """One panel per metric, one point with its interval per arm; rates from 0 to 100 %."""
        metrics, rows = self.metrics, -(-len(self.metrics) // PANELS)
        names = ["\n".join(wrap(name, ARM)) for name in self.arms]
        height = rows * (0.85 + len(names) * max(0.3, *(0.06 + 0.13 * (1 + name.count("\n")) for name in names)))
        note = "\n".join((*self.notes, "Lines: 95 % intervals."))
        with style.picture(path, height, len(metrics), rows, self.title, note, sharey=True) as (_, panels):
            for panel, metric in zip(panels, metrics, strict=True):
                self._draw(panel, metric)
            panels[0].set_yticks(range(len(names)), names)
            panels[0].set_ylim(len(names) - 0.5, -0.6)
        return Path(path)

    def _draw(self, panel: Any, metric: str) -> None:
        first = next(iter(self.arms))
        drawn = {arm: figures[metric] for arm, figures in self.arms.items() if metric in figures}
        rates = any(isinstance(figure, Rate) for figure in drawn.values())
        for row, arm in enumerate(self.arms):
            if arm not in drawn:
                continue
            figure, color = drawn[arm], style.color_of("aligned" if arm == first else arm)
            scale, digits = (100, 0) if isinstance(figure, Rate) else (1, 2)
            low, high = (scale * bound for bound in figure.interval)
            value, across = scale * figure.value, (low, high) if math.isfinite(high) else None
            style.point(panel, value, row, color, across=across, hollow=style.is_control(arm))
            where: dict[str, Any] = {"xytext": (0, 4), "textcoords": "offset points", "ha": "center", "va": "bottom"}
            panel.annotate(f"{value:.{digits}f}", (value, row), **where)
        if rates:
            panel.set_xlim(-8, 108)
            panel.set_xticks([0, 50, 100])
        else:
            panel.locator_params(axis="x", nbins=4)
        panel.set_title("\n".join([*wrap(metric, HEADING), f"N={self._sizes(metric)}"]))
        panel.set_xlabel("%" if rates else "nats per token")
        panel.tick_params(length=0)
        panel.grid(axis="x")

    def _sizes(self, metric: str) -> str:
        sizes = sorted({figures[metric].n for figures in self.arms.values() if metric in figures})
        return str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]}-{sizes[-1]}"


def _wrapped(metric: str, width: int) -> list[str]:
    """The lines of a heading."""
    return wrap(metric, width, break_long_words=False) or [metric]


def _short(figure: Figure) -> str:
    """A rate with its interval; a mean with half of it."""
    if isinstance(figure, Rate) or not math.isfinite(figure.interval[1]):
        return str(figure)
    return f"{figure.value:.2f} ± {figure.interval[1] - figure.value:.2f}"
