"""What make installs and checks, with a Python that writes down how it was called and makes pip's directory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import required

ROOT = Path(__file__).resolve().parents[2]
PYTHON = f"""#!/bin/sh
case "$1$2" in -c*torch*) exec {sys.executable} "$@" ;; esac
echo "$@" >> calls
for word; do case "$last" in --target | --dest) mkdir -p "$word" ;; esac; last=$word; done
case "$*" in *"$BREAKS"*) exit 1 ;; esac
"""
APART = [".nightly", *(f".nightly-{name}" for name in ("inspect", "encoder", "jupyter", "quantized", "build"))]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The Makefile beside an environment that it takes for whole."""
    if shutil.which("make") is None:
        pytest.skip("needs make")
    (tmp_path / "requirements").mkdir()
    for name in ("setup.cfg", "pyproject.toml", "constraints.txt", "requirements/demo.txt"):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (0, 0))
    shutil.copyfile(ROOT / "Makefile", tmp_path / "Makefile")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON, encoding="utf-8")
    python.chmod(0o755)
    for name in (".demo", ".installed"):
        (tmp_path / ".venv" / name).touch()
    return tmp_path


def make(tree: Path, target: str, breaks: str = "nothing", **variables: str) -> tuple[int, list[str], str]:
    """The exit status of make, the calls of Python, and what make said."""
    (tree / "calls").unlink(missing_ok=True)
    command = ["make", "--no-print-directory", target]
    environment = {**os.environ, "BREAKS": breaks, **variables}
    for name in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS"):
        environment.pop(name, None)
    done = subprocess.run(command, cwd=tree, env=environment, check=False, capture_output=True, text=True)
    calls = (tree / "calls").read_text(encoding="utf-8").splitlines() if (tree / "calls").exists() else []
    return done.returncode, calls, done.stdout + done.stderr


@pytest.mark.parametrize("name", APART)
def test_an_installation_is_whole_or_begins_again(tree: Path, name: str) -> None:
    stamp = f"{name}/.installed"
    assert make(tree, stamp, breaks="install")[0] != 0
    (tree / name / "half").mkdir()
    status, calls, said = make(tree, stamp)
    assert (status, len(calls)) == (0, 1), said
    assert f"--target {name} " in calls[0]
    assert not (tree / name / "half").exists()


def test_a_download_that_fails_is_done_again(tree: Path) -> None:
    """Two calls of pip, and the first leaves the directory."""
    assert make(tree, ".llama_cpp/.installed", breaks="pip download")[0] != 0
    _, calls, _ = make(tree, ".llama_cpp/.installed")
    assert len(calls) == 2


def test_a_change_of_the_pins_installs_again(tree: Path) -> None:
    for changed, expected in ((False, 1), (False, 0), (True, 1)):
        if changed:
            os.utime(tree / "Makefile", (2**31, 2**31))
        status, calls, said = make(tree, ".nightly-encoder/.installed")
        assert (status, len(calls)) == (0, expected), said


def test_the_gpu_target_fails_without_a_gpu(tree: Path) -> None:
    (tree / "torch.py").write_text("class cuda:\n    is_available = lambda: False\n", encoding="utf-8")
    status, calls, said = make(tree, "gpu", PYTHONPATH=str(tree))
    assert status != 0
    assert not calls, "no test has run"
    assert "torch sees no GPU" in said


def test_a_package_that_is_asked_for_is_not_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pytest.importorskip is required.importorskip, "of every test"
    with pytest.raises(pytest.skip.Exception):
        pytest.importorskip("no_such_package.part", reason="not here")
    monkeypatch.setenv(required.VARIABLE, "torch,no_such_package")
    with pytest.raises(ModuleNotFoundError, match="not here; PEFT_SAFETY_REQUIRE"):
        pytest.importorskip("no_such_package.part", reason="not here")
    assert pytest.importorskip("json").dumps({}) == "{}"
