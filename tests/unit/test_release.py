"""What a release says of itself: versions, citation, extras, workflows; the sentence where an extra is missing."""

from __future__ import annotations

import configparser
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import peft_safety
from peft_safety.errors import ConfigError, MissingPackageError, extra

ROOT = Path(__file__).resolve().parents[2]
MISSING = {
    "cli": ("import peft_safety.cli", ["typer"]),
    "trl": ("import peft_safety.recipes.job.steps", ["trl"]),
    "inspect": ("import peft_safety.evaluation.inspect_ai", ["inspect_ai"]),
    "axolotl": ("import peft_safety.integrations.axolotl", ["axolotl"]),
    "plot": ("from peft_safety.reporting import style; style.require_matplotlib()", ["matplotlib"]),
    "eval": ("from peft_safety.evaluation.lm_eval import functions; functions.harmful()", ["datasets"]),
    "quant": (
        "from peft_safety.recipes.load import load_model; load_model('', load_in_4bit=True)",
        ["bitsandbytes"],
    ),
}


@pytest.fixture(scope="module")
def setup() -> configparser.ConfigParser:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    return config


def requirements(lines: str) -> list[Requirement]:
    return [Requirement(line) for line in lines.splitlines() if line.strip()]


def test_the_version_is_one(setup: configparser.ConfigParser) -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert peft_safety.__version__ == setup["metadata"]["version"] == str(citation["version"])
    assert citation["license"] == setup["metadata"]["license_expression"]
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors", "type"} <= citation.keys()


def test_the_package_itself_needs_what_peft_needs_and_no_more(setup: configparser.ConfigParser) -> None:
    from importlib.metadata import requires

    own = {canonicalize_name(one.name) for one in requirements(setup["options"]["install_requires"])}
    of_peft = {canonicalize_name(Requirement(line).name) for line in requires("peft") or () if "extra ==" not in line}
    assert own - {"peft"} <= of_peft


def test_the_oldest_releases_are_the_lower_bounds(setup: configparser.ConfigParser) -> None:
    lines = (ROOT / "requirements" / "oldest.txt").read_text(encoding="utf-8").splitlines()
    oldest = dict(line.split("==") for line in lines if "==" in line)
    asked = requirements(setup["options"]["install_requires"])
    for name in ("cli", "quant", "trl"):
        asked += [one for one in requirements(setup["options.extras_require"][name]) if one.name != "peft-safety"]
    bounds = {one.name: [own for own in one.specifier if own.operator == ">="] for one in asked}
    found = {name: Version(own.version) for name, several in bounds.items() for own in several if name != "torch"}
    assert found == {name: Version(version) for name, version in oldest.items()}


def test_every_extra_that_a_message_names_exists(setup: configparser.ConfigParser) -> None:
    named = {
        (path.name, name)
        for path in sorted((ROOT / "peft_safety").rglob("*.py"))
        for name in re.findall(r'\bextra\("([\w-]+)"', path.read_text(encoding="utf-8"))
    }
    assert {name for _, name in named} == MISSING.keys()
    assert MISSING.keys() <= setup["options.extras_require"].keys()


def test_the_entry_points_exist(setup: configparser.ConfigParser) -> None:
    targets = re.findall(r"= ([\w.]+)(?::(\w+))?$", "\n".join(setup["options.entry_points"].values()), re.MULTILINE)
    assert len(targets) == 3
    for module, name in targets:
        place = ROOT / module.replace(".", "/")
        file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
        text = file.read_text(encoding="utf-8")
        assert not name or re.search(rf"^(?:def|class) {name}\b", text, re.MULTILINE), f"{module}:{name}"


@pytest.mark.slow
@pytest.mark.parametrize("name", MISSING)
def test_a_missing_extra_is_named_in_one_sentence(name: str) -> None:
    code, absent = MISSING[name]
    hide = f"import sys; sys.modules.update(dict.fromkeys({absent!r}))\n"
    done = subprocess.run([sys.executable, "-c", hide + code], capture_output=True, text=True, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("peft_safety.errors.MissingPackageError: "), done.stderr
    assert f'pip install "peft-safety[{name}]"' in last


def test_the_command_line_without_its_extra_says_so_without_a_traceback() -> None:
    code = "import sys; sys.modules['rich'] = None; from peft_safety.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert 'the command line needs typer and rich: pip install "peft-safety[cli]"' in line


def test_a_missing_package_is_both_kinds_of_error() -> None:
    for kind in (ConfigError, ImportError):
        with (
            pytest.raises(kind, match=r'things need it: pip install "peft-safety\[cli\]" \(no module\)\.'),
            extra("cli", "things need it"),
        ):
            raise ImportError("no module")
    with pytest.raises(MissingPackageError, match="inner"), extra("cli", "outer"), extra("trl", "inner"):
        raise ImportError


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda path: path.name)
def test_workflows_are_well_formed(path: Path) -> None:
    flow: dict[Any, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert {"name", True, "permissions", "concurrency", "jobs"} <= flow.keys(), "YAML 1.1 reads `on` as True"
    assert flow["permissions"] == {}, "each job says what it needs"
    for job in flow["jobs"].values():
        assert set(job.get("needs", [])) <= flow["jobs"].keys()
        assert {"timeout-minutes", "permissions"} <= job.keys()
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step)
            assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", step.get("uses", f"a@{0:040}")), "a tag can be moved"
            for target in re.findall(r"\bmake ([\w-]+)", step.get("run", "")):
                assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


def test_make_wheel_keeps_the_site_and_clears_what_setuptools_made(tmp_path: Path) -> None:
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text("#!/bin/sh\nexit 0\n")
    python.chmod(0o755)
    for name in ("build/site/index.html", "build/lib/gone.py", "build/bdist.linux-x86_64/gone", "dist/old.whl"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    (tmp_path / "tools").mkdir()
    done = ["make", "-f", str(ROOT / "Makefile"), "-o", "tools/.installed", "wheel", "BUILD=tools", "BIN=bin"]
    subprocess.run(done, cwd=tmp_path, check=True, capture_output=True)
    assert [path.name for path in (tmp_path / "build").rglob("*")] == ["site", "index.html"]
    assert not (tmp_path / "dist").exists()
