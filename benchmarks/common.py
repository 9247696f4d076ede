"""What every benchmark needs: interleaved timing, peak memory in a process of its own, and results as JSON lines with
the environment beside them.
"""

from __future__ import annotations

import ctypes
import gc
import json
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from peft_safety.errors import DataError

RESULTS = Path(__file__).parent / "results"


def interleaved(arms: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Wall-clock seconds of each arm, `rounds` times, the arms taken in turn so that a noisy neighbor hits them all
    alike.
    """
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for index in range(warmup + rounds):
        for name, arm in arms.items():
            started = time.perf_counter()
            arm()
            if index >= warmup:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio(seconds: Mapping[str, Sequence[float]], of: str, to: str) -> tuple[float, float, float]:
    """Median of the per-round ratios `of / to`, with their quartiles: noise that lasts longer than a round cancels."""
    ratios = sorted(a / b for a, b in zip(seconds[of], seconds[to], strict=True))
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (ratios[0],) * 3
    return middle, low, high


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Median seconds of each arm, under the heading of a column."""
    return {f"{arm} s": statistics.median(values) for arm, values in seconds.items()}


def peak_memory(module: str, *arguments: str) -> dict[str, Any]:
    """Run `python -m module arguments` in a fresh process; it prints one JSON object as its last line."""
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{module} {' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def resident_mib() -> float:
    """Memory this process has held at most, MiB. On Linux not `ru_maxrss`, which a child inherits from the process
    that started it.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 if sys.platform != "darwin" else 1024) / 1024


def resident_now_mib() -> float:
    """Memory this process holds, MiB; 0 where the system does not say."""
    status = Path("/proc/self/status")
    return int(status.read_text().partition("VmRSS:")[2].split()[0]) / 1024 if status.exists() else 0.0


def reset_peak() -> None:
    """Let `resident_mib` start anew from here, where the system can (Linux).

    Freed memory goes back to the system first: what an earlier measurement left with the allocator would hide what the
    next one takes.
    """
    gc.collect()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")


def record(name: str, rows: Sequence[Mapping[str, Any]], environment: Mapping[str, Any]) -> Path:
    """Write `results/<name>.jsonl`: the environment first, then a line a row."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.jsonl"
    lines = [json.dumps({"environment": dict(environment)}), *(json.dumps(dict(row)) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def with_section(page: Path, markers: tuple[str, str], section: str) -> str:
    """The text of a page with `section`, markers included, in the place of what stands between its markers.

    Raises:
        DataError: it does not have each marker once.
    """
    text = page.read_text(encoding="utf-8")
    begin, end = markers
    if text.count(begin) != 1 or text.count(end) != 1:
        raise DataError(f"{page} lacks the markers {begin} and {end}. Put them where the table belongs.")
    return re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: section, text, flags=re.DOTALL)


def show(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows of equal keys as a table."""
    table = Table(title=title, title_justify="left")
    for key in rows[0]:
        table.add_column(key, justify="right" if isinstance(rows[0][key], (int, float)) else "left")
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(table)
