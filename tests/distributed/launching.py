"""Runs a module of this folder, which starts its own processes, and reads what they print."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def printed(module: str, *arguments: str, timeout: float = 300) -> list[dict[str, Any]]:
    """The JSON lines that `python -m tests.distributed.MODULE ARGUMENTS` prints; it must end well."""
    done = subprocess.run(
        [sys.executable, "-m", f"tests.distributed.{module}", *arguments],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
        },
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
