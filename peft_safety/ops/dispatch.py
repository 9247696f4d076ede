"""Which backend runs, and why."""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from peft_safety.errors import ConfigError
from peft_safety.ops import reference

VARIABLE = "PEFT_SAFETY_BACKEND"
Backend = Literal["reference", "triton"]
OLDEST_CAPABILITY = (8, 0)
"""Ampere, for which the kernels are written: bf16 tensor cores and asynchronous copies."""


def backend_for(tensor: Tensor) -> tuple[Backend, str]:
    """The backend and the reason: as `PEFT_SAFETY_BACKEND` says (a ConfigError where that cannot run); otherwise
    Triton on NVIDIA GPUs from compute capability 8.0 on, and the reference everywhere else.
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted not in ("", "auto", "reference", "triton"):
        raise ConfigError(f"{VARIABLE}={wanted!r} is no backend. Use reference or triton, or unset it.")
    if wanted == "reference":
        return "reference", f"{VARIABLE}=reference"
    obstacle = _obstacle(tensor.device)
    if wanted == "triton":
        if obstacle is not None:
            raise ConfigError(f"{VARIABLE}=triton, but {obstacle}. Unset it, or use a device that Triton can serve.")
        return "triton", f"{VARIABLE}=triton"
    if obstacle is None and tensor.device.type == "cuda":
        return "triton", "an NVIDIA GPU"
    return "reference", obstacle or "CPU tensors (the interpreter is for tests)"


def _obstacle(device: torch.device) -> str | None:
    if not _has_triton():
        return "triton is not installed"
    if device.type == "cpu":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return None if interpreted else "the tensors are on the CPU (which needs TRITON_INTERPRET=1)"
    if device.type != "cuda" or torch.version.hip is not None:
        return f"the tensors are on {'a ROCm device' if device.type == 'cuda' else device.type}"
    capability = _capability(device)
    if capability >= OLDEST_CAPABILITY:
        return None
    own, least = (".".join(map(str, version)) for version in (capability, OLDEST_CAPABILITY))
    return f"the GPU has compute capability {own}, below {least}"


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def backend(tensor: Tensor) -> ModuleType:
    """The module with `nf4_dequant`, `nf4_merged` and `nf4_skinny` for tensors like this one."""
    if backend_for(tensor)[0] == "reference":
        return reference
    from peft_safety.ops import triton_backend

    return triton_backend
