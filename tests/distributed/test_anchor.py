"""An anchor under DDP: the replicas stay equal to the bit, and go where one process goes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.dist
@pytest.mark.slow
def test_replicas_with_an_anchor_stay_equal_and_agree_with_one_process(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.distributed.anchor", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    alone, *ranks = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    assert [alone["world"], *(rank["world"] for rank in ranks)] == [1, 2, 2]
    assert ranks[0] == ranks[1]
    assert ranks[0]["sum"] == pytest.approx(alone["sum"], rel=1e-4)
    assert ranks[0]["kl"] == pytest.approx(alone["kl"], rel=1e-2)
    assert alone["kl"] > 0
    assert list(alone["looks"]) == ["0", "3", "6"]
