"""The kernels compiled for four generations of GPUs, none of which is needed: they fit, do not spill, and round as
they should.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from peft_safety.ops import reference
from tests.ops import compiling

pytest.importorskip("triton", minversion="3.6")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton's assembler comes with its Linux wheels only")

#: Registers a thread. Of 65,536 a processor this leaves four blocks of 128 threads for the skinny product of a few
#: rows, and two of 256 for weights.
LIMITS = {"dequant_kernel": 96, "partial_kernel": 128, "finish_kernel": 128, "z_kernel": 255}
#: With 32 or more rows of x the sums alone take more.
MANY_ROWS = 255


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # kernels must compile today, not once upon a time


def check(variant: compiling.Variant, capability: int) -> None:
    found = compiling.compiled(variant, capability)
    few = variant.constants.get("BT", 16) == 16
    assert found.spilled == 0, variant.name
    assert found.registers <= (LIMITS[variant.kernel] if few else MANY_ROWS), (variant.name, found.registers)
    bf16_results = [variant.types.get(name) for name in ("out", "y", "z")].count("*bf16")
    bf16_results -= variant.kernel == "finish_kernel" and variant.types["z"] == "*bf16"  # which it only reads
    assert len(re.findall(r"cvt\.rn\.bf16(x2)?\.f32", found.ptx)) >= bf16_results  # to nearest, ties to even
    if variant.constants.get("TERMS") == 3:  # a chunk of columns is added in fp32, not by the tensor cores
        added = len(re.findall(r"\badd(?:\.rn)?\.f32\b", found.ptx)) + 2 * len(
            re.findall(r"\badd(?:\.rn)?\.f32x2\b", found.ptx)
        )
        assert added >= variant.constants["BT"] * variant.constants["BR"] // (32 * variant.warps), variant.name
    rounded_apart = variant.kernel in ("dequant_kernel", "partial_kernel")  # product and sum of a scale
    assert "fma." not in found.ptx or not rounded_apart, variant.name


@pytest.mark.parametrize("capability", [80, 120])
@pytest.mark.parametrize("variant", compiling.representative(), ids=lambda variant: variant.name)
def test_what_a_model_runs(variant: compiling.Variant, capability: int) -> None:
    check(variant, capability)


@pytest.mark.slow
@pytest.mark.parametrize("capability", compiling.ARCHITECTURES)
@pytest.mark.parametrize("variant", compiling.everything(), ids=lambda variant: variant.name)
def test_everything(variant: compiling.Variant, capability: int) -> None:
    check(variant, capability)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_byte_of_the_table_of_words(dtype: torch.dtype) -> None:
    """The kernel takes a word apart by its bits, in fp16 under the interpreter; here it is done for all bytes and both
    halves.
    """
    from peft_safety.ops import triton_backend

    table = triton_backend.words(torch.device("cpu"), dtype).tolist()
    for byte, word in enumerate(table):
        first, second = (
            torch.tensor(half - (half >> 15 << 16), dtype=torch.int16).view(dtype)
            for half in (word & 0xFFFF, word >> 16 & 0xFFFF)
        )
        assert first == torch.tensor(reference.NF4_CODE[byte >> 4]).to(dtype)
        assert second == torch.tensor(reference.NF4_CODE[byte & 15]).to(dtype)
