"""The site: every page has its place, every public name a description, and the drawing is that of the imports."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import peft_safety
from peft_safety import audit, errors, evaluation
from peft_safety.methods import safe_lora, somf

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
OUTSIDE = ("../SECURITY.md", "../CONTRIBUTING.md", "../CHANGELOG.md")
DIRECTIVE = re.compile(r"^::: (peft_safety[\w.]*)$", re.MULTILINE)


class Loader(yaml.SafeLoader):
    """Leaves the tags of MkDocs alone: `!ENV`, and Python's names."""


Loader.add_multi_constructor("!ENV", lambda *_: None)
Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)


def site_module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"site_{name}", DOCS / "_site" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return dict(yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader))


def leaves(entry: Any) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    return [leaf for part in (entry.values() if isinstance(entry, dict) else entry) for leaf in leaves(part)]


def test_the_menu_has_every_page_once(config: dict[str, Any]) -> None:
    pages = [page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")]
    assert sorted(leaves(config["nav"])) == sorted([*pages, *OUTSIDE])


def test_nothing_comes_from_elsewhere_and_every_link_is_checked(config: dict[str, Any]) -> None:
    assert config["strict"]
    assert config["theme"]["font"] is False
    assert "repo_url" not in config, "its stars come from GitHub"
    assert {level for part in config["validation"].values() for level in part.values()} == {"warn"}
    own = [*config.get("extra_css", []), *config.get("extra_javascript", []), *config["hooks"]]
    assert not [path for path in own if "://" in path]
    assert "http" not in (DOCS / "_site" / "site.css").read_text(encoding="utf-8")


def found(name: str) -> Any:
    """What a dotted name means: the longest module, and then attributes."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            thing = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            thing = getattr(thing, part)
        return thing
    raise ModuleNotFoundError(name)


def test_every_public_name_is_described_once() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in sorted((DOCS / "api").glob("*.md")))
    names = DIRECTIVE.findall(text)
    described = [found(name) for name in names]
    assert not [name for name, thing in zip(names, described, strict=True) if not inspect.getdoc(thing)]
    rooms = (peft_safety, audit, evaluation, safe_lora, somf)
    public = [getattr(room, name) for room in rooms for name in room.__all__]
    public += [thing for thing in vars(errors).values() if inspect.isclass(thing) and issubclass(thing, Exception)]
    missing = [thing.__name__ for thing in public if not any(thing is other for other in described)]
    assert missing == []
    assert len({id(thing) for thing in described}) == len(described), "one is described twice"


def test_docstrings_are_in_the_form_that_the_site_reads() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in sorted((DOCS / "api").glob("*.md")))
    odd = re.compile(r"^(Args|Attributes|Returns|Raises):.*\S", re.MULTILINE)
    assert [name for name in DIRECTIVE.findall(text) if odd.search(inspect.getdoc(found(name)) or "")] == []


def test_the_drawing_of_the_rooms_is_that_of_the_imports() -> None:
    pytest.importorskip("grimp")
    rooms = site_module("rooms")
    drawn = rooms.DRAWING.read_text(encoding="utf-8")
    assert drawn == rooms.drawing(), "python docs/_site/rooms.py"
    order = [room for level in rooms.floors() for room in level]
    pairs = rooms.imports(order)
    assert ("recipes", "core") in pairs, "imports are seen"
    other = rooms.draw([[room] for room in order], pairs - {("recipes", "core")})
    assert other.count("<circle") == drawn.count("<circle") - 1


def test_of_one_floor_the_room_that_imports_the_other_stands_above() -> None:
    pytest.importorskip("grimp")
    rows = re.findall(r'text-anchor="end">(\w+)<', site_module("rooms").drawing())
    assert rows.index("audit") < rows.index("evaluation")


@pytest.fixture(scope="module")
def places() -> ModuleType:
    return site_module("places")


def test_what_a_page_links_to(places: ModuleType) -> None:
    text = "[a](../x.md#y) ![b](p.png) [c](https://x.y) [d](#here) [e](../../z.py)"
    assert places.linked(text, "guides/page.md") == ["x.md", "guides/p.png", "../z.py"]
    assert places.linked("[a](docs/x.md)", "../README.md") == ["../docs/x.md"]


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("../SECURITY.md", "security/index.html"),
        ("../examples/patches/p/README.md", "examples/patches/p/index.html"),
        ("../examples/x.py", "examples/x.py/index.html"),
        ("../notebooks/x.ipynb", "notebooks/x.ipynb/index.html"),
        ("../benchmarks/results/x.png", "benchmarks/results/x.png"),
    ],
)
def test_where_a_file_from_outside_comes(places: ModuleType, uri: str, path: str) -> None:
    assert places.place(uri) == path


def test_source_code_and_notebooks_are_shown_as_pages(places: ModuleType) -> None:
    assert places.page("../examples/x.py", "a = 1\n") == "# `examples/x.py`\n\n`````python\na = 1\n`````\n"
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "[a](../docs/x.md)"]},
        {"cell_type": "code", "source": ["b = 2"], "outputs": [{"text": "printed"}]},
    ]
    shown = places.page("../notebooks/x.ipynb", json.dumps({"cells": cells}))
    assert shown == "# Title\n[a](../docs/x.md)\n\n`````python\nb = 2\n`````\n"
    assert places.linked(shown, "../notebooks/x.ipynb") == ["../docs/x.md"]


def test_the_lock_holds_what_the_extra_asks_for() -> None:
    lines = (ROOT / "requirements" / "docs.txt").read_text(encoding="utf-8").splitlines()
    pins = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
    asked = re.search(r"^docs =\n((?: +\S.*\n)+)", (ROOT / "setup.cfg").read_text(encoding="utf-8"), re.MULTILINE)
    assert asked is not None
    for requirement in map(Requirement, asked[1].split("\n")[:-1]):
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)])


@pytest.mark.slow
def test_the_site_is_built_strictly(tmp_path: Path) -> None:
    beside = ROOT / ".nightly-docs" / "bin" / "mkdocs"
    mkdocs = str(beside) if beside.exists() else shutil.which("mkdocs", path=str(Path(sys.executable).parent))
    if mkdocs is None:
        pytest.skip("needs the extra docs, or `make docs`")
    command = [mkdocs, "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = [page.read_text(encoding="utf-8") for page in (tmp_path / "site").rglob("*.html")]
    assert len(pages) > 50
    loaded = [
        url
        for page in pages
        for url in re.findall(r'<(?:script|img|link rel="stylesheet")[^>]*"(https?:[^"]+)"', page)
    ]
    assert loaded == [], "something is fetched from elsewhere"
