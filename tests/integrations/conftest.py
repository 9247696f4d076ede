"""A tiny model, a subspace and rows on disk, and the frameworks' own environments (`make integrations`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peft_safety import SafetySubspace
from peft_safety.data import calibration_rows, load
from tests.integrations.install import python_of
from tests.tiny import tiny_llama, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
Run = Callable[..., str]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Minutes each, and only where the frameworks are installed."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.integration)
            item.add_marker(pytest.mark.timeout(1800))


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, `guardspace.safetensors`, `salora.safetensors` and `task.jsonl` in one directory."""
    folder = tmp_path_factory.mktemp("world")
    # rows of whole blocks: where a row is no multiple of them, bitsandbytes 0.50 dequantizes wrongly on AVX512 CPUs
    model, tokenizer = tiny_llama(hidden=64), tiny_tokenizer()
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    rows: dict[str, Any] = {"data": calibration_rows("guardspace", "harmful")[:16], "tokenizer": tokenizer}
    for method in ("guardspace", "salora"):
        subspace = SafetySubspace.from_activations(
            model, **rows, method=method, rank=8, target_modules="all-linear", progress=False
        )
        subspace.save(folder / f"{method}.safetensors")
    task = [
        [{"role": "user", "content": row["text"]}, {"role": "assistant", "content": row["label"]}]
        for row in load("benign_task", "train")[:16]
    ]
    lines = "".join(json.dumps({"messages": turns}) + "\n" for turns in task)
    (folder / "task.jsonl").write_text(lines, encoding="utf-8")
    return folder


@pytest.fixture
def run(world: Path) -> Run:
    """Runs Python in a framework's environment; the test is skipped where that is not installed."""

    def run(framework: str, *arguments: str, code: int = 0) -> str:
        python = python_of(framework)
        if not python.exists():
            pytest.skip(f"{framework} is not installed: make integrations")
        environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment |= {"AXOLOTL_DO_NOT_TRACK": "1", "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1", "USE_HF": "1"}
        command = [str(python), *arguments]
        asked: dict[str, Any] = {"cwd": world, "env": environment, "timeout": 600}
        done = subprocess.run(command, check=False, capture_output=True, text=True, **asked)
        said = done.stdout + done.stderr
        assert done.returncode == code, said[-6000:]
        return said

    return run


def verified(adapter: Path, subspace: Path | None = None) -> dict[str, Any]:
    """What `peft-safety verify` says of an adapter, with this environment's PEFT; every check must pass."""
    command = [sys.executable, "-m", "peft_safety", "verify", str(adapter), "--json"]
    command += [] if subspace is None else ["--subspace", str(subspace)]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts
