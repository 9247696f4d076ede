"""Two real processes, found as `accelerate launch` starts them: they share the rows, and each has the whole result."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def start(world: int) -> list[dict]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.screening.worker"],
            cwd=ROOT,
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        outputs = [process.communicate(timeout=280) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * world, outputs[0][1][-2000:]
    return [json.loads(next(line for line in out.splitlines() if line.startswith("{"))) for out, _ in outputs]


@pytest.mark.dist
@pytest.mark.slow
def test_processes_share_the_rows_and_agree():
    (alone,), both = start(1), start(2)
    assert [one["process"] for one in both] == [[0, 2], [1, 2]]
    assert alone["process"] == [0, 1]
    for one in both:
        assert one["rows"] == both[0]["rows"]
        assert [row[0] for row in one["rows"]] == list(range(11))
        assert [row[2] for row in one["rows"]] == [row[2] for row in alone["rows"]]
        assert [row[1] for row in one["rows"]] == pytest.approx([row[1] for row in alone["rows"]], abs=1e-4)
        assert one["dropped"] == alone["dropped"]
    assert alone["dropped"], "some rows are found"
    assert [sum(parts) for parts in zip(*(one["read"] for one in both), strict=True)] == alone["read"]
