"""How every report is printed: plain tables with notes below them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from peft_safety.errors import extra

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Key = TypeVar("Key")
WIDTH = 80
"""Columns of a terminal that a printed table fits, unless its figures need more."""

CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}
"""What a terminal would act upon, and what is printed instead."""
GAP = 2
"""Columns of the terminal between two columns of a table."""
NARROWEST = 24
"""Columns that running text has at least."""


def printable(text: str) -> str:
    return text.translate(CONTROLS)


def plain_console(**options: Any) -> Console:
    """A console that prints text as it is: names and messages from files are no markup, nor codes for a terminal."""
    require_rich()
    from rich.console import Console

    class Plain(Console):
        def render_str(self, text: str, **how: Any) -> Any:
            return super().render_str(printable(text), **how)

    return Plain(markup=False, emoji=False, highlight=False, **options)


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], prose: Collection[int] = ()) -> Table:
    """A table of text; without any heading there is no header. Only `prose` columns are wrapped."""
    require_rich()
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    rows = list(rows)
    result = Table(box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False, show_edge=False, show_header=any(headings))
    for index, heading in enumerate(headings):
        if index in prose:
            result.add_column(heading, overflow="fold")
            continue
        justify: Any = "right" if index else "left"
        result.add_column(heading, justify=justify, no_wrap=True, min_width=_wide(heading, rows, index))
    for row in rows:
        result.add_row(*row)
    return result


def tables(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[Table]:
    """The columns in several tables that fit `WIDTH`, if no two columns are wider. Each has the first column."""
    rows = list(rows)
    widths = {index: _wide(heading, rows, index) for index, heading in enumerate(headings)}
    groups = fitting(widths, WIDTH + GAP)
    return [table([headings[i] for i in group], [[row[i] for i in group] for row in rows]) for group in groups]


def fitting(widths: Mapping[Key, int], room: int) -> list[list[Key]]:
    """Groups of columns that fit side by side, each with a gap. Every group starts with the first column."""
    first, *others = widths
    groups = [[first]]
    for one in others:
        if len(groups[-1]) > 1 and sum(widths[member] + GAP for member in (*groups[-1], one)) > room:
            groups.append([first])
        groups[-1].append(one)
    return groups


def _wide(heading: str, rows: Iterable[Sequence[str]], index: int) -> int:
    """Columns of the terminal that a column of a table needs: a wide character takes two, a control character four."""
    require_rich()
    from rich.cells import cell_len

    lines = (line for cell in (heading, *(row[index] for row in rows)) for line in cell.split("\n"))
    return max(cell_len(printable(line).expandtabs()) for line in lines)


def show(title: str, *tables: Table, notes: Iterable[str] = ()) -> None:
    """Print tables between a title and notes to stdout, in `WIDTH` columns or as wide as the figures need."""
    console = plain_console()
    width = min(console.width, WIDTH)
    needed = [sum((column.min_width or NARROWEST) + GAP for column in part.columns) - GAP for part in tables]
    console.width = max([width, *needed])
    console.print(title, style="italic", width=width)
    for part in tables:
        console.print(part)
        console.print()
    for note in notes:
        console.print(note, style="dim", width=width)


def number(value: float | None, form: str = ".3g") -> str:
    """A figure as text: "-" for None and NaN, and no minus sign before a rounded zero."""
    if value is None or math.isnan(value):
        return "-"
    text = format(value, form)
    return text if float(text) else text.lstrip("-")


def median(values: Iterable[float]) -> float:
    """The median of the values that are known; NaN without any."""
    known = [value for value in values if not math.isnan(value)]
    return statistics.median(known) if known else math.nan


def span(values: Iterable[int]) -> str:
    """The smallest and the largest, or the only one: `16`, `96-144`."""
    known = list(values)
    return "-".join(str(value) for value in sorted({min(known), max(known)}))


def require_rich() -> None:
    """A MissingPackageError where rich, which draws the tables, is not installed."""
    with extra("cli", "tables need rich"):
        import rich.table  # noqa: F401
