"""Printing wide tables and saving pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555", "#882255")
"""Color-blind safe (Okabe and Ito)."""
WIDEST = 1000


def print_wide(table: Table) -> None:
    """Print a table to stdout, as wide as its columns need: no figure is cut off."""
    from rich.console import Console

    console = Console()
    needed = console.measure(table, options=console.options.update(max_width=WIDEST)).maximum
    console.width = max(console.width, needed)
    console.print(table)


def save_figure(canvas: Any, path: str | Path, **options: Any) -> Path:
    """Write a matplotlib figure as a PNG. Creates the directory."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path, dpi=150, format="png", **options)
    return path
