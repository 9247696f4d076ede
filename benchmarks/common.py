"""What all benchmarks share: timing, memory, results files, tables and the model that they measure."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from rich.console import Console
from rich.table import Table

from examples.get_model import MODEL_NAME, model_dir
from peft_safety.errors import ArtifactError, DataError

T = TypeVar("T")
RESULTS = Path(__file__).parent / "results"
"""All results files and pictures."""


def wall_clock(work: Callable[[], Any]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


class Spent(NamedTuple):
    """Seconds of one call, and CPU seconds of this process in it, which other work on the machine changes less."""

    wall: float
    cpu: float


def both_clocks(work: Callable[[], Any]) -> Spent:
    """Wall and CPU seconds of one call."""
    started = time.process_time()
    wall = wall_clock(work)
    return Spent(wall, time.process_time() - started)


def cpu_clock(work: Callable[[], Any]) -> float:
    """CPU seconds of one call."""
    return both_clocks(work).cpu


def in_turns(
    arms: Mapping[str, Callable[[], Any]], rounds: int, warmup: int, clock: Callable[[Callable[[], Any]], T]
) -> dict[str, list[T]]:
    """What the clock says of each arm, `rounds` times. The arms take turns, so that other work on the machine slows
    all alike; every other round goes backwards, so that none always follows the same one.
    """
    found: dict[str, list[T]] = {name: [] for name in arms}
    for index in range(warmup + rounds):
        for name in arms if index % 2 == 0 else reversed(list(arms)):
            spent = clock(arms[name])
            if index >= warmup:
                found[name].append(spent)
    return found


def interleaved(
    arms: Mapping[str, Callable[[], Any]],
    rounds: int,
    warmup: int = 1,
    clock: Callable[[Callable[[], Any]], float] = wall_clock,
) -> dict[str, list[float]]:
    """Seconds of each arm, in turns."""
    return in_turns(arms, rounds, warmup, clock)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, lower quartile and upper quartile."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return middle, low, high


def ratio(seconds: Mapping[str, Sequence[float]], of: str, to: str) -> tuple[float, float, float]:
    """Median and quartiles of the ratio `of / to` in each round: slow noise cancels."""
    return quartiles([a / b for a, b in zip(seconds[of], seconds[to], strict=True)])


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Median seconds of each arm, as columns of a table."""
    return {f"{arm} s": statistics.median(values) for arm, values in seconds.items()}


def compared(seconds: Mapping[str, Sequence[float]], of: str, to: str, digits: int) -> dict[str, Any]:
    """Median seconds of each arm and the ratio `of / to` with its quartiles, as columns of a table."""
    middle, low, high = ratio(seconds, of, to)
    return {**medians(seconds), f"{of}/{to}": middle, "quartiles": f"{low:.{digits}f}-{high:.{digits}f}"}


def peak_memory(module: str, *arguments: str) -> dict[str, Any]:
    """Run `python -m module arguments` in a new process. Its last line is a JSON object, which is returned."""
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{module} {' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def resident_mib() -> float:
    """Peak memory of this process in MiB. Linux: not `ru_maxrss`, which a child process inherits from its parent."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 if sys.platform != "darwin" else 1024) / 1024


def resident_now_mib() -> float:
    """Memory that this process holds now in MiB; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    return int(status.read_text().partition("VmRSS:")[2].split()[0]) / 1024 if status.exists() else 0.0


def reset_peak() -> None:
    """Let `resident_mib` start again from here (Linux only).

    Freed memory goes back to the system first. Otherwise the next measurement would reuse it and look smaller.
    """
    gc.collect()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")


def kept_result(path: Path) -> dict[str, Any] | None:
    """What a finished cell has written; None if it has not run.

    Raises:
        ArtifactError: the file is damaged. (A killed run damages no file, since files appear by one rename.)
    """
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} is no result of a cell: {error}. Delete it; the cell then runs again.") from error
    return result


def publish(path: Path, text: str) -> None:
    """Write a file by one rename: it is complete or not there.

    Raises:
        ArtifactError: no space or no permission. No part of the file remains.
    """
    staged = path.with_suffix(f".{os.getpid()}")
    try:
        staged.write_text(text, encoding="utf-8")
        os.replace(staged, path)
    except OSError as error:
        staged.unlink(missing_ok=True)
        raise ArtifactError(
            f"{path} cannot be written: {error}. Finished cells are safe; make room and run the same command again."
        ) from error


def record(
    name: str, rows: Sequence[Mapping[str, Any]], environment: Mapping[str, Any], folder: Path = RESULTS
) -> Path:
    """Write `folder/<name>.jsonl`: first the environment, then one line for each row.

    Raises:
        ArtifactError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    lines = [json.dumps({"environment": dict(environment)}), *(json.dumps(dict(row)) for row in rows)]
    publish(path, "\n".join(lines) + "\n")
    return path


def recorded(name: str, folder: Path = RESULTS) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The environment and the rows of `folder/<name>.jsonl`.

    Raises:
        DataError: there is no such file, or it holds something else.
    """
    path = folder / f"{name}.jsonl"
    try:
        first, *rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return first["environment"], rows
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} holds no results ({type(error).__name__}). Run its benchmark first.") from error


def show(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows of equal keys as a table."""
    table = Table(title=title, title_justify="left")
    for key in rows[0]:
        table.add_column(key, justify="right" if isinstance(rows[0][key], (int, float)) else "left")
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(table)


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """A command line that prints its description as it is written."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_model(parser: argparse.ArgumentParser) -> None:
    """The option `--model`."""
    parser.add_argument("--model", help=f"model directory; default: {MODEL_NAME}")


def model_source(given: str | None) -> str:
    """The directory of the model that `--model` asks for."""
    return given or str(model_dir())


def model_name(given: str | None) -> str:
    """What the results say of `--model`."""
    return MODEL_NAME if given is None else "given"


def load_causal(directory: str | Path, nf4: bool = False) -> Any:
    """A model in fp32, or in NF4. NF4 computes in bf16 on a GPU and in fp32 on a CPU, where bf16 is much slower."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {"dtype": torch.float32}
    if nf4:
        options["dtype"] = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=options["dtype"]
        )
    return AutoModelForCausalLM.from_pretrained(str(directory), **options)
