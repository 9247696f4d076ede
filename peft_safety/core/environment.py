"""The software and machine of a run."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = ("peft-safety", "torch", "transformers", "peft", "numpy")


def environment(seed: int, **extra: Any) -> dict[str, Any]:
    """Versions, machine, seed and further settings of a run, as plain JSON values."""
    result = {"python": platform.python_version(), "machine": platform.machine(), "cpus": os.cpu_count(), "seed": seed}
    return {**result, **versions(), **extra}


def versions(model: Any = None) -> dict[str, str]:
    """Of the packages that a figure depends on: the usual ones, and others that layers or weights of the model are of,
    such as bitsandbytes.
    """
    parts = () if model is None else (*model.modules(), *model.parameters())
    others = {(type(part).__module__ or "").partition(".")[0] for part in parts} - {""}
    result = {}
    for package in (*PACKAGES, *sorted(others - {name.replace("-", "_") for name in PACKAGES})):
        with suppress(PackageNotFoundError):
            result[package] = version(package)
    return result
