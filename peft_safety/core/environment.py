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


def versions() -> dict[str, str]:
    """Of the packages that a figure depends on."""
    result = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            result[package] = version(package)
    return result
