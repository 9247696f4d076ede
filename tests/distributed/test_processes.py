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


def launch(folder: Path, method: str) -> dict[str, dict[str, float]]:
    """What rank 0 of each run prints."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.distributed.worker", str(folder), method],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line.pop("how"): line for line in found}


@pytest.mark.dist
@pytest.mark.parametrize(
    "method",
    [
        "both",
        *(
            pytest.param(method, marks=pytest.mark.slow)
            for method in ("salora", "guardspace", "guardspace-residual", "frozen", "window")
        ),
    ],
)
def test_replicas_and_shards_stay_protected_and_agree_with_one_process(method: str, tmp_path: Path) -> None:
    runs = launch(tmp_path, method)
    assert list(runs) == ["alone", "ddp", "fsdp2"]
    alone = runs.pop("alone")
    assert 0 < alone["leak"] <= LEAK
    for how, found in runs.items():
        assert found["leak"] <= LEAK, how
        assert (found["sharded"] > 0) == (how == "fsdp2")
        assert found["sum"] == pytest.approx(alone["sum"], rel=2e-3), how
