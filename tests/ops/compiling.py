"""Compile the kernels for GPUs that are not there, exactly as the backend would launch them, and read what the
assembler made of them.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
from typing import Any, NamedTuple
from unittest import mock

import torch

ARCHITECTURES = (80, 90, 100, 120)
_POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


class Variant(NamedTuple):
    """One compilation of one kernel.

    Attributes:
        types: type of each argument that is no constant.
        constants: the rest.
    """

    name: str
    kernel: str
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int


class Usage(NamedTuple):
    """What the assembler reports: registers a thread, bytes stored to and loaded from the stack for want of more; and
    its input.
    """

    registers: int
    spilled: int
    ptx: str


def _specialized(types: dict[str, str], constants: dict[str, Any], **sizes: int) -> None:
    """A size of 1 is a constant to Triton, as it will be at the launch."""
    for name, size in sizes.items():
        if size == 1:
            del types[name]
            constants[name] = 1


def _quantized(nested: bool) -> dict[str, str]:
    return {
        "wq": "*u8",
        "absmax": "*u8" if nested else "*fp32",
        "absmax2": "*fp32",
        "code2": "*fp32",
        "offset": "*fp32",
    }


def dequant_variant(dtype: torch.dtype, blocksize: int, nested: bool) -> Variant:
    from peft_safety.ops import triton_backend as backend

    tile = backend.WEIGHT_TILES[dtype.itemsize]
    types = {"out": _POINTERS[dtype], **_quantized(nested), "code": "*fp32", "n": "i32", "k": "i32"}
    constants = {
        "BLOCKSIZE": blocksize, "BLOCK2": 256 if nested else 1, "NESTED": nested, "BN": tile.rows, "BK": tile.columns,
    }  # fmt: skip
    name = f"dequant-{dtype}-{blocksize}-{nested}".replace("torch.", "")
    return Variant(name, "dequant_kernel", types, constants, tile.warps)


def z_variant(dtype: torch.dtype, factor: torch.dtype, r: int) -> Variant:
    from peft_safety.ops import triton_backend as backend

    tile = backend.Z_TILE
    terms, widen = backend.z_terms(dtype, factor)
    types = {"z": _POINTERS[torch.promote_types(dtype, factor)], "x": _POINTERS[dtype], "a": _POINTERS[factor]}
    types |= dict.fromkeys(("k", "r", "t"), "i32")
    constants = {"BT": tile.rows, "BK": tile.columns, "BR": backend.rank_block(r), "TERMS": terms, "WIDEN": widen}
    _specialized(types, constants, r=r)
    return Variant(f"z-{dtype}-{factor}-{r}".replace("torch.", ""), "z_kernel", types, constants, tile.warps)


def representative() -> list[Variant]:
    """What a 7B model in bf16 with double quantization runs, with an adapter in fp32."""
    bf16, fp32 = torch.bfloat16, torch.float32
    return [dequant_variant(bf16, 64, True), z_variant(bf16, fp32, 48)]


def everything() -> list[Variant]:
    """Each kernel in each dtype, with plain and quantized scales, at the corners of its tiles."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    found = [dequant_variant(dtype, 64, nested) for dtype in (bf16, fp32) for nested in (False, True)]
    found += [dequant_variant(dtype, blocksize, True) for dtype in (bf16, fp32) for blocksize in (32, 4096)]
    found += [z_variant(bf16, factor, r) for factor in (bf16, fp32) for r in (1, 16, 48)]
    return [*found, dequant_variant(fp16, 64, True), z_variant(fp16, fp16, 16), z_variant(fp16, fp32, 16)]


def compiled(variant: Variant, capability: int) -> Usage:
    """Compile, and read what the assembler says of the result."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from peft_safety.ops import triton_backend

    file = importlib.import_module(f"peft_safety.ops.triton_{variant.kernel.removesuffix('_kernel')}")
    function = getattr(file, variant.kernel)
    signature = {name: variant.types.get(name, "constexpr") for name in function.arg_names}
    aligned = {name for name, kind in variant.types.items() if kind.startswith("*")} | (
        {"n", "k"} & variant.types.keys()
    )
    attributes = {
        (place,): [["tt.divisibility", 16]] for place, name in enumerate(function.arg_names) if name in aligned
    }
    source = ASTSource(function, signature, constexprs=variant.constants, attrs=attributes)
    options = {"num_warps": variant.warps, **triton_backend.OPTIONS}
    said = io.StringIO()
    with mock.patch.dict(os.environ, {"TRITON_DUMP_PTXAS_LOG": "1"}), contextlib.redirect_stdout(said):
        kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, spilled = (
        re.findall(pattern, said.getvalue())
        for pattern in (r"Used (\d+) registers", r"(\d+) bytes spill (?:stores|loads)")
    )
    if not registers or not spilled:
        raise AssertionError(f"{variant.name}: the assembler said nothing of registers. Was it found in a cache?")
    return Usage(max(map(int, registers)), sum(map(int, spilled)), kernel.asm["ptx"])
