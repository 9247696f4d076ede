"""Several real processes: protection holds on replicas and on shards, and on both it is the single process's
trajectory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LEAK = 1e-6


def launch(folder: Path, world: int, how: str, method: str) -> dict[str, float]:
    """What rank 0 prints. The ranks meet in a file: a port that is free now may be another process's a moment
    later.
    """
    meeting = folder / how
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.distributed.worker"]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(meeting), how, method],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(world)
    ]
    outputs = [process.communicate(timeout=200) for process in ranks]
    for process, (_, error) in zip(ranks, outputs, strict=True):
        assert process.returncode == 0, error.decode()[-2000:]
    return json.loads(outputs[0][0].decode().strip().splitlines()[-1])


@pytest.mark.dist
@pytest.mark.parametrize(
    "method",
    ["both", *(pytest.param(m, marks=pytest.mark.slow) for m in ("salora", "guardspace", "guardspace-residual"))],
)
def test_replicas_and_shards_stay_protected_and_agree_with_one_process(method: str, tmp_path: Path) -> None:
    alone = launch(tmp_path, 1, "alone", method)
    assert 0 < alone["leak"] <= LEAK
    for how in ("ddp", "fsdp2"):
        found = launch(tmp_path, 2, how, method)
        assert found["leak"] <= LEAK, how
        assert (found["sharded"] > 0) == (how == "fsdp2")
        assert found["sum"] == pytest.approx(alone["sum"], rel=2e-3), how
