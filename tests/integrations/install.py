"""One virtual environment for each framework, since each pins its own releases of transformers and PEFT:

    python tests/integrations/install.py [axolotl] [ms-swift] [unsloth]

makes `.integrations/NAME` with exactly the packages of `NAME.txt`. Torch and whatever else that file lacks are those
of the Python that runs this script; no dependency is resolved, so no other torch is fetched.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
ENVIRONMENTS = HERE.parents[1] / ".integrations"
FRAMEWORKS = ("axolotl", "ms-swift", "unsloth")


def python_of(framework: str) -> Path:
    """The interpreter of a framework's environment, which may not exist."""
    return ENVIRONMENTS / framework / "bin" / "python"


def install(framework: str) -> None:
    """Make the environment, or bring it up to date."""
    python, packages = python_of(framework), HERE / f"{framework}.txt"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", ENVIRONMENTS / framework], check=True)
    asked = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    place = Path(subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip())
    (place / "base.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    pip = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--requirement", packages]
    subprocess.run(pip, check=True)


if __name__ == "__main__":
    for name in sys.argv[1:] or FRAMEWORKS:
        install(name)
