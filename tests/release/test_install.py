"""The built wheel in fresh environments (`make wheel-check`): newest and oldest releases, without and with extras."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.interop.helpers import readme_code
from tests.tiny import tiny_llama, tiny_tokenizer

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
WHEELS = sorted((ROOT / "dist").glob("*.whl"))
TORCH = os.environ.get("PEFT_SAFETY_TORCH", "")
PARTS = {"newest": [], "oldest": ["-c", str(ROOT / "requirements" / "oldest.txt")]}
TALLY = (
    "from importlib.metadata import distributions as all; import json; "
    "print(json.dumps({there.metadata['Name'].lower(): there.version for there in all()}))"
)
ENTRY_POINTS = (
    "from importlib.metadata import distribution; from peft_safety.errors import MissingPackageError as M\n"
    "for entry in distribution('peft-safety').entry_points:\n"
    "    try: entry.load()\n"
    "    except M as error: print(entry.group, error)\n"
    "    else: print(entry.group, 'loads')\n"
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not (TORCH and len(WHEELS) == 1), reason="make wheel-check builds the wheel and names torch"),
]


@dataclass(frozen=True)
class Fresh:
    """A virtual environment, and a directory that is outside of this repository."""

    folder: Path
    chosen: list[str]

    def pip(self, *words: str) -> None:
        self.run("python", "-m", "pip", "install", "--quiet", "--no-compile", TORCH, *self.chosen, *words)

    def run(self, program: str, *words: str, code: int = 0) -> str:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        done = subprocess.run(
            [self.folder / "venv" / "bin" / program, *words],
            cwd=self.folder,
            env={**kept, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(self.folder / "cache"), "COLUMNS": "200"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def packages(self) -> dict[str, str]:
        found: dict[str, str] = json.loads(self.run("python", "-I", "-c", TALLY))
        return found


@pytest.mark.parametrize("part", PARTS)
def test_the_wheel_works_in_a_fresh_environment(part: str, tmp_path: Path) -> None:
    shutil.copy(ROOT / "tests" / "tiny.py", tmp_path)
    tiny_llama().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    fresh, (wheel,) = Fresh(tmp_path, PARTS[part]), WHEELS
    try:
        fresh.pip(str(wheel))
        plain = fresh.packages()
        assert not {"trl", "datasets", "matplotlib", "bitsandbytes", "pandas", "lm_eval"} & plain.keys()
        (tmp_path / "out").mkdir()
        assert "plain install works" in fresh.run("python", "-I", str(HERE / "plain.py"), str(tmp_path), "out")
        loaded = fresh.run("python", "-I", "-c", ENTRY_POINTS)
        assert 'inspect_ai these tasks need inspect_ai: pip install "peft-safety[inspect]"' in loaded
        if {"typer", "rich"} <= plain.keys():  # newer releases of transformers bring them
            assert "console_scripts loads" in loaded
        else:
            assert 'pip install "peft-safety[cli]"' in fresh.run("peft-safety", "info", code=2)
        print(f"{part}: {len(plain)} packages without extras: {plain}")
        fresh.pip(f"{wheel}[trl]")
        print(f"{part}: {len(fresh.packages())} packages with [trl]")
        fresh.run("python", "-m", "pip", "check")
        assert "GUARDSPACE" in fresh.run("peft-safety", "info", "--json")
        rows = [{"prompt": f"Color of item {i}?", "completion": " red" if i % 2 else " green"} for i in range(32)]
        (tmp_path / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        (tmp_path / "quickstart.py").write_text(readme_code(tmp_path / "model"), encoding="utf-8")
        fresh.run("python", "quickstart.py")
        checked = fresh.run("peft-safety", "verify", "adapter")
        assert "GUARDSPACE, frozen A" in checked
    finally:
        shutil.rmtree(tmp_path / "venv")
