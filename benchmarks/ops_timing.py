"""Timing on a GPU: CUDA events, arms in turn, eager or as one CUDA graph. On a CPU the same calls take a clock, so
that the code can be tried.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

Work = Callable[[], Any]
WARMUPS = 3


def once(work: Work, device: str) -> float:
    """Seconds of one call."""
    if device == "cpu":
        started = time.perf_counter()
        work()
        return time.perf_counter() - started
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def timed(works: Mapping[str, Work], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each arm, `rounds` times, taken in turn."""
    for work in works.values():
        for _ in range(WARMUPS):
            work()
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            seconds[name].append(once(work, device))
    return seconds


def graphed(work: Work, device: str) -> Work | str:
    """The work as a CUDA graph, or why it cannot be one."""
    if device == "cpu":
        return work
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARMUPS):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            work()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return graph.replay


def both_ways(works: Mapping[str, Work], rounds: int, device: str) -> dict[str, dict[str, list[float]]]:
    """`{"eager": seconds, "graphed": seconds}`; an arm that cannot be captured is missing from the second, and said to
    be.
    """
    captured: dict[str, Work] = {}
    for name, work in works.items():
        found = graphed(work, device)
        if isinstance(found, str):
            print(f"{name}: cannot be captured in a CUDA graph: {found}")
        else:
            captured[name] = found
    return {"eager": timed(works, rounds, device), "graphed": timed(captured, rounds, device)}


def spread(seconds: list[float]) -> tuple[float, float, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else (seconds[0],) * 3
    return middle, low, high


def bandwidth(device: str, mib: int = 1024) -> float:
    """Bytes a second that a device copy moves, read and written together: the floor of what is bound by memory."""
    source = torch.empty(mib << 18, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    seconds = timed({"copy": lambda: target.copy_(source)}, 10, device)["copy"]
    return 2 * source.nbytes / statistics.median(seconds)


def launches(work: Work, device: str) -> int | None:
    """Kernels that a call launches; None on a CPU."""
    if device == "cpu":
        return None
    from torch.profiler import ProfilerActivity, profile

    work()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        work()
        torch.cuda.synchronize()
    return sum(event.count for event in found.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA)
