"""Fresh environments, outside of this repository, for what `make wheel` has built; and what is put down about them."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DIST = ROOT / "dist"
MEASURED = ROOT / "build" / "installs.jsonl"
"""One `Install` a line; `tests/release/table.py` writes the table of docs/install.md from it."""
TORCH = os.environ.get("PEFT_SAFETY_TORCH", "")
"""What pip is asked for, for the same build of torch everywhere."""
OWN = {"pip", "setuptools"}
"""What a new environment holds already."""
TALLY = """
import json, os, sysconfig
from importlib.metadata import distributions
size = 0
for folder, inner, names in os.walk(sysconfig.get_path("purelib")):
    inner[:] = [name for name in inner if name != "__pycache__"]
    size += sum(os.lstat(os.path.join(folder, name)).st_size for name in names)
print(json.dumps([{there.metadata["Name"].lower(): there.version for there in distributions()}, size]))
"""


@dataclass(frozen=True)
class Install:
    """What an environment holds after one call of pip.

    Attributes:
        releases: "newest" or "oldest".
        what: the requirements of this call, for a reader.
        seconds: how long pip took.
        packages: number of distributions, without pip and setuptools.
        megabytes: 10^6 bytes of their files, without compiled Python.
        versions: `{name: version}`.
        python, platform, date: where and when.
    """

    releases: str
    what: str
    seconds: float
    packages: int
    megabytes: float
    versions: dict[str, str]
    python: str
    platform: str
    date: str

    def put_down(self) -> None:
        """Append it to `MEASURED`."""
        MEASURED.parent.mkdir(exist_ok=True)
        with MEASURED.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(self)) + "\n")


@dataclass(frozen=True)
class Fresh:
    """A virtual environment in a directory of its own.

    Args:
        folder: where it is, and where its programs run.
        releases: "newest" or "oldest".
    """

    folder: Path
    releases: str = "newest"

    def __post_init__(self) -> None:
        subprocess.run([sys.executable, "-m", "venv", self.folder / "venv"], check=True)

    def pip(self, *words: str, what: str = "") -> dict[str, str]:
        """Install, and put the measured `Install` down where the call has a name.

        Returns:
            `{name: version}` of everything that is installed afterwards.
        """
        chosen = ["-c", str(ROOT / "requirements" / "oldest.txt")] if self.releases == "oldest" else []
        start = time.monotonic()
        self.run("python", "-m", "pip", "install", "--quiet", "--no-compile", TORCH, *chosen, *words)
        seconds = time.monotonic() - start
        found: dict[str, str]
        found, size = json.loads(self.run("python", "-I", "-c", TALLY))
        if what:
            python, day = ".".join(map(str, sys.version_info[:2])), time.strftime("%Y-%m-%d")
            number, system = len(found.keys() - OWN), f"{platform.system()} {platform.machine()}"
            Install(self.releases, what, seconds, number, size / 1e6, found, python, system, day).put_down()
        return found

    def run(self, program: str, *words: str | Path, code: int = 0, at: Path | None = None) -> str:
        """What a program of the environment prints, which has to end with this exit status."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        done = subprocess.run(
            [self.folder / "venv" / "bin" / program, *words],
            cwd=at or self.folder,
            env={**kept, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(self.folder / "cache"), "COLUMNS": "200"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr


def built(kind: str) -> Path | None:
    """The one distribution in dist/ of a kind, "whl" or "tar.gz"."""
    found = sorted(DIST.glob(f"*.{kind}"))
    return found[0] if len(found) == 1 else None
