"""Several real processes: protection holds on replicas and on shards, and on both it is the single process's
trajectory.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.launching import printed

LEAK = 1e-6


def launch(folder: Path, method: str, *hows: str) -> dict[str, dict[str, float]]:
    """What rank 0 of each run prints."""
    return {line.pop("how"): line for line in printed("worker", str(folder), method, *hows, timeout=400)}


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


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("method", ["frozen", "window", "guardspace", "salora"])
def test_zero_keeps_the_protection_and_the_trajectory(method: str, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="`make nightly` installs DeepSpeed")
    runs = launch(tmp_path, method, "alone", "zero2", "zero3")
    alone = runs.pop("alone")
    assert list(runs) == ["zero2", "zero3"]
    for how, found in runs.items():
        assert found["leak"] <= LEAK, how
        assert (found["sharded"] > 0) == (how == "zero3")
        assert found["sum"] == pytest.approx(alone["sum"], rel=2e-3), how
