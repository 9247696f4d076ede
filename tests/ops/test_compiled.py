"""The kernels compiled for four generations of GPUs, none of which is needed: they fit, do not spill, and round as
they should.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.ops import compiling

pytest.importorskip("triton", minversion="3.6")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton's assembler comes with its Linux wheels only")

#: Registers a thread. Of 65,536 a processor this leaves two blocks of 256 threads for weights.
LIMITS = {"dequant_kernel": 96, "z_kernel": 255}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # kernels must compile today, not once upon a time


def check(variant: compiling.Variant, capability: int) -> None:
    found = compiling.compiled(variant, capability)
    assert found.spilled == 0, variant.name
    assert found.registers <= LIMITS[variant.kernel], (variant.name, found.registers)
    bf16_results = [variant.types.get(name) for name in ("out", "z")].count("*bf16")
    assert len(re.findall(r"cvt\.rn\.bf16(x2)?\.f32", found.ptx)) >= bf16_results  # to nearest, ties to even
    if variant.constants.get("TERMS") == 3:  # a chunk of columns is added in fp32, not by the tensor cores
        added = len(re.findall(r"\badd(?:\.rn)?\.f32\b", found.ptx)) + 2 * len(
            re.findall(r"\badd(?:\.rn)?\.f32x2\b", found.ptx)
        )
        assert added >= variant.constants["BT"] * variant.constants["BR"] // (32 * variant.warps), variant.name
    if variant.kernel == "dequant_kernel":  # product and sum of a scale are rounded apart
        assert "fma." not in found.ptx, variant.name


@pytest.mark.parametrize("capability", [80, 120])
@pytest.mark.parametrize("variant", compiling.representative(), ids=lambda variant: variant.name)
def test_what_a_model_runs(variant: compiling.Variant, capability: int) -> None:
    check(variant, capability)


@pytest.mark.slow
@pytest.mark.parametrize("capability", compiling.ARCHITECTURES)
@pytest.mark.parametrize("variant", compiling.everything(), ids=lambda variant: variant.name)
def test_everything(variant: compiling.Variant, capability: int) -> None:
    check(variant, capability)
