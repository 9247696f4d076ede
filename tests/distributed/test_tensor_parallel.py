"""Tensor parallelism: a frozen A is whole in both processes, its B is split, and the saved adapter is the one that a
single process trains. What cannot be kept whole is refused before the model is changed.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.launching import printed


@pytest.mark.dist
@pytest.mark.slow
def test_a_frozen_a_beside_split_columns(tmp_path: Path) -> None:
    pytest.importorskip("transformers.distributed.tensor_parallel", reason="a transformers that splits by DTensor")
    (found,) = printed("split", str(tmp_path))
    assert found["factor"] == ["DTensor", 16, 4], "half of B in each process"
    assert found["one A"]
    assert found["leak"] <= 1e-6
    assert found["checked"]
    assert found["saved"] < 1e-5
    assert found["trajectory"] < 2e-3, "that of one process, but for rounding"
    assert found["span"] > 1 - 1e-5, "calibrated on split weights as on whole ones"
    assert "splits the inputs" in found["rows"]
    assert found["rows"] == found["rows calibrated"]
    assert "Only a frozen lora_A" in found["projected"]
    assert found["projected"] == found["SaLoRA"]
    assert "cannot be merged part by part" in found["merge"]
