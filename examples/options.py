"""The command-line options that all scripts here have."""

from __future__ import annotations

import argparse
from pathlib import Path


def command_line(description: str | None, out: str) -> argparse.ArgumentParser:
    """A parser with --out (default `out`), --model, --split and --seed."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--out", type=Path, default=Path(out), help="directory of everything that is written")
    result.add_argument(
        "--model", help="hub id or directory of an instruct model; default SmolLM2-135M-Instruct, fetched when missing"
    )
    result.add_argument(
        "--split",
        choices=("validation", "test"),
        default="test",
        help="choose settings on validation; look at test once",
    )
    result.add_argument("--seed", type=int, default=0)
    return result
