"""Timing on a GPU: CUDA events, arms in turn, eager or as one CUDA graph. On a CPU the same calls use the clock, so
that the code can be tested.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.common import interleaved, wall_clock

Work = Callable[[], Any]
WARMUPS = 3


def cuda_clock(work: Work) -> float:
    """Seconds of one call on the GPU."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def timed(works: Mapping[str, Work], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each arm, `rounds` times, in turn."""
    return interleaved(works, rounds, WARMUPS, wall_clock if device == "cpu" else cuda_clock)


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
    """`{"eager": seconds, "graphed": seconds}`. An arm that cannot be captured as a graph is printed, and missing from
    the second.
    """
    captured: dict[str, Work] = {}
    for name, work in works.items():
        graph = graphed(work, device)
        if isinstance(graph, str):
            print(f"{name}: cannot be captured in a CUDA graph: {graph}")
        else:
            captured[name] = graph
    return {"eager": timed(works, rounds, device), "graphed": timed(captured, rounds, device)}


def bandwidth(device: str, mib: int = 1024) -> float:
    """Bytes per second of a copy on the device, read and written together: the limit of memory-bound work."""
    source = torch.empty(mib << 18, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    seconds = timed({"copy": lambda: target.copy_(source)}, 10, device)["copy"]
    return 2 * source.nbytes / statistics.median(seconds)


def launches(work: Work, device: str) -> int | None:
    """Number of kernels that a call launches; None on a CPU."""
    if device == "cpu":
        return None
    from torch.profiler import ProfilerActivity, profile

    work()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        work()
        torch.cuda.synchronize()
    return sum(event.count for event in trace.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA)
