"""An anchor under DDP: the replicas stay equal to the bit, and go where one process goes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.launching import printed


@pytest.mark.dist
@pytest.mark.slow
def test_replicas_with_an_anchor_stay_equal_and_agree_with_one_process(tmp_path: Path) -> None:
    alone, *ranks = printed("anchor", str(tmp_path), timeout=280)
    assert [alone["world"], *(rank["world"] for rank in ranks)] == [1, 2, 2]
    assert ranks[0] == ranks[1]
    assert ranks[0]["sum"] == pytest.approx(alone["sum"], rel=1e-4)
    assert ranks[0]["kl"] == pytest.approx(alone["kl"], rel=1e-2)
    assert alone["kl"] > 0
    assert list(alone["looks"]) == ["0", "3", "6"]
