"""Every kernel under Triton's interpreter: see `interpreted.py`."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("triton")
pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module", params=["covering", pytest.param("all", marks=pytest.mark.slow)])
def lines(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PEFT_SAFETY_BACKEND": "triton"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.interpreted", request.param],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert found[-1] == {"kernel": "done", "interpreted": True}
    return found


def test_dequantized_to_the_last_bit(lines: list[dict[str, Any]]) -> None:
    cases = [line for line in lines if line["kernel"] == "weight"]
    assert len(cases) in (2 * 5 * 3, 5 * 3)
    for one, other in itertools.combinations(("shape", "dtype", "nested"), 2):
        pairs = {(str(line[one]), line[other]) for line in cases}
        assert len(pairs) == len({a for a, _ in pairs}) * len({b for _, b in pairs}), "every pair"
    assert [line for line in cases if not line["equal"]] == []


BOUNDS = {"torch.float16": 0.6, "torch.bfloat16": 1.2, "torch.float32": 4.0}
"""Half a spacing where results are rounded, and a whole one where the interpreter truncates (bf16); a tenth for the
summation, more in fp32.
"""


def test_the_product_with_a_has_the_precision_of_a(lines: list[dict[str, Any]]) -> None:
    """An fp32 A with 16-bit inputs: to the rounding of fp32, not of the inputs."""
    cases = [line for line in lines if line["kernel"] == "z"]
    assert {line["dtype of z"] for line in cases} == {"torch.float32", "torch.bfloat16", "torch.float16"}
    assert all(line["dtype of z"] == line["factor"] for line in cases)
    assert [line for line in cases if not line["z"] <= BOUNDS[line["dtype of z"]]] == []


def test_sums_that_tensor_cores_truncate_stay_short(lines: list[dict[str, Any]]) -> None:
    """One accumulator for all columns would be 75 spacings off."""
    (case,) = (line for line in lines if line["kernel"] == "z, truncated sums")
    assert case["z"] <= 8.0


def test_the_layer_is_that_of_the_reference(lines: list[dict[str, Any]]) -> None:
    cases = [line for line in lines if line["kernel"] == "layer"]
    assert [line["rows"] for line in cases] == [3, 70]
    assert all(line["off"] <= 4.0 for line in cases), cases


def test_nothing_is_written_beside_the_results(lines: list[dict[str, Any]]) -> None:
    assert [line["outside"] for line in lines if line["kernel"] == "bounds"] == [[]]
