"""Which backend runs, and why: for each type of device those that are registered, the best one first. The reference
serves every device.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from peft_safety.errors import ConfigError

VARIABLE = "PEFT_SAFETY_BACKEND"
OLDEST_CAPABILITY = (8, 0)
"""Ampere, for which the kernels are written: bf16 tensor cores and asynchronous copies."""


class Backend(NamedTuple):
    """Kernels for one type of device.

    Attributes:
        module: what holds `nf4_dequant` and `lora_z`; imported when it first serves a tensor.
        obstacle: why it cannot serve a device; None if it can.
        reason: why it is taken unless another is asked for; None for one that only `PEFT_SAFETY_BACKEND` chooses.
    """

    name: str
    module: str
    obstacle: Callable[[torch.device], str | None]
    reason: str | None


_BACKENDS: dict[str, list[Backend]] = {}


def register(device_type: str, backend: Backend) -> None:
    """Let a backend serve a type of device, before those that are registered for it."""
    _BACKENDS.setdefault(device_type, []).insert(0, backend)


def backend_for(tensor: Tensor) -> tuple[str, str]:
    """The name of the backend, and the reason: as `PEFT_SAFETY_BACKEND` says (a ConfigError where that cannot run),
    else the first one that is registered for the device and can serve it, else the reference.
    """
    chosen, reason = _choose(tensor.device)
    return chosen.name, reason


def backend(tensor: Tensor) -> ModuleType:
    """The module with the kernels for tensors like this one."""
    return importlib.import_module(_choose(tensor.device)[0].module)


def _choose(device: torch.device) -> tuple[Backend, str]:
    wanted = os.environ.get(VARIABLE, "")
    known = _BACKENDS.get(device.type, [])
    names = {entry.name for table in _BACKENDS.values() for entry in table} | {_REFERENCE.name}
    if wanted not in ("", "auto", *names):
        raise ConfigError(f"{VARIABLE}={wanted!r} is no backend. Use {' or '.join(sorted(names))}, or unset it.")
    if wanted == _REFERENCE.name:
        return _REFERENCE, f"{VARIABLE}={wanted}"
    obstacle = f"no backend is registered for {device.type}"
    for entry in known:
        if wanted not in ("", "auto", entry.name):
            continue
        obstacle = entry.obstacle(device) or ""
        if not obstacle and wanted == entry.name:
            return entry, f"{VARIABLE}={wanted}"
        if not obstacle and entry.reason is not None:
            return entry, entry.reason
    if wanted in names:
        raise ConfigError(f"{VARIABLE}={wanted}, but {obstacle}. Unset it, or use a device that it can serve.")
    return _REFERENCE, obstacle or "CPU tensors (the interpreter is for tests)"


def _gpu_obstacle(device: torch.device) -> str | None:
    if not _has_triton():
        return "triton is not installed"
    if torch.version.hip is not None:
        return "the tensors are on a ROCm device"
    if (capability := _capability(device)) >= OLDEST_CAPABILITY:
        return None
    own, least = (".".join(map(str, version)) for version in (capability, OLDEST_CAPABILITY))
    return f"the GPU has compute capability {own}, below {least}"


def _interpreter_obstacle(device: torch.device) -> str | None:
    if not _has_triton():
        return "triton is not installed"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return None if interpreted else "the tensors are on the CPU (which needs TRITON_INTERPRET=1)"


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


_REFERENCE = Backend("reference", "peft_safety.ops.reference", lambda device: None, None)
register("cuda", Backend("triton", "peft_safety.ops.triton_backend", _gpu_obstacle, "an NVIDIA GPU"))
register("cpu", Backend("triton", "peft_safety.ops.triton_backend", _interpreter_obstacle, None))
