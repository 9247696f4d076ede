"""The built wheel in fresh environments (`make wheel-check`): newest and oldest releases, without and with extras."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.interop.helpers import readme_code
from tests.release.fresh import MEASURED, ROOT, TORCH, Fresh, built

HERE = Path(__file__).resolve().parent
WHEEL = built("whl")
ENTRY_POINTS = (
    "from importlib.metadata import distribution; from peft_safety.errors import MissingPackageError as M\n"
    "for entry in distribution('peft-safety').entry_points:\n"
    "    try: entry.load()\n"
    "    except M as error: print(entry.group, error)\n"
    "    else: print(entry.group, 'loads')\n"
)
CANARIES = ["tests/unit", "tests/interop/test_canary.py"] + [
    f"tests/peft/test_{name}.py"
    for name in ("guardspace", "lifecycle", "frozen", "export", "merge", "invariant", "ortho_patch", "safe_lora")
]
"""Run with each set of releases: what PEFT and transformers have to offer, and each method on a tiny model."""
MODEL = (
    "import sys; sys.path.append('.'); from tiny import tiny_llama, tiny_tokenizer\n"
    "for made in (tiny_llama(), tiny_tokenizer()): made.save_pretrained('model')\n"
)
"""Saves a tiny model, by the environment's own transformers: older ones cannot read a newer one's tokenizer."""
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not (TORCH and WHEEL), reason="make wheel-check builds the wheel and names torch"),
]


@pytest.fixture(scope="module", autouse=True)
def nothing_measured() -> None:
    MEASURED.unlink(missing_ok=True)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Outside of this repository, with code for a tiny model, and data; the environment made there goes at the end."""
    shutil.copy(ROOT / "tests" / "tiny.py", tmp_path)
    rows = [{"prompt": f"Color of item {i}?", "completion": " red" if i % 2 else " green"} for i in range(32)]
    (tmp_path / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "out").mkdir()
    yield tmp_path
    shutil.rmtree(tmp_path / "venv")


@pytest.mark.parametrize("releases", ["newest", "oldest"])
def test_the_wheel_works_in_a_fresh_environment(releases: str, folder: Path) -> None:
    fresh = Fresh(folder, releases)
    torch = fresh.pip(what="torch")
    before = fresh.pip("peft", "transformers", what="peft, transformers")
    plain = fresh.pip(str(WHEEL), what="peft-safety")
    assert plain.keys() - before.keys() == {"peft-safety"}, "the package itself needs what PEFT needs, and no more"
    assert not {"trl", "datasets", "matplotlib", "bitsandbytes", "pandas", "lm_eval"} & plain.keys()
    assert "plain install works" in fresh.run("python", "-I", HERE / "plain.py", folder, "out")
    loaded = fresh.run("python", "-I", "-c", ENTRY_POINTS)
    assert 'inspect_ai these tasks need inspect_ai: pip install "peft-safety[inspect]"' in loaded
    assert 'axolotl.plugins the plugin needs axolotl: pip install "peft-safety[axolotl]"' in loaded
    assert "console_scripts loads" in loaded
    if not {"typer", "rich"} <= plain.keys():  # newer releases of transformers bring them
        assert 'pip install "peft-safety[cli]"' in fresh.run("peft-safety", "info", code=2)

    fresh.pip(f"{WHEEL}[cli]", what="peft-safety[cli]")
    assert "GUARDSPACE" in fresh.run("peft-safety", "info", "--json")
    fresh.run("python", "-I", "-c", MODEL)
    if sys.version_info >= (3, 11):  # as TRL asks for
        trained = fresh.pip(f"{WHEEL}[trl]", what="peft-safety[trl]")
        assert trained["torch"] == torch["torch"]
        (folder / "quickstart.py").write_text(readme_code(folder / "model"), encoding="utf-8")
        fresh.run("python", "quickstart.py")
        assert "GUARDSPACE, frozen A" in fresh.run("peft-safety", "verify", "adapter")
    fresh.run("python", "-m", "pip", "check")

    fresh.pip(f"{WHEEL}[plot,quant]", "pytest", "pytest-timeout", "hypothesis")
    options = ["-q", "-p", "no:cacheprovider", "--basetemp", folder / "tests", "-m", "not slow and not gpu"]
    print(fresh.run("python", "-m", "pytest", *CANARIES, *options, at=ROOT).splitlines()[-1])


def test_the_evaluation_extra_with_the_newest_releases(folder: Path) -> None:
    fresh = Fresh(folder)
    fresh.pip()
    fresh.pip(f"{WHEEL}[eval]", what="peft-safety[eval]")
    fresh.run("python", "-m", "pip", "check")
    fresh.run("python", "-I", "-c", "import matplotlib.pyplot, peft_safety.evaluation.lm_eval.functions")
    fresh.run("python", "-I", "-c", MODEL)
    tasks = fresh.run("python", "-I", "-m", "peft_safety.evaluation.lm_eval").strip().splitlines()[-1]
    options = f"--model hf --model_args pretrained=model --device cpu --limit 4 --include_path {tasks}".split()
    assert "refusal" in fresh.run("lm_eval", *options, "--apply_chat_template", "--tasks", "peft_safety_refusal")
