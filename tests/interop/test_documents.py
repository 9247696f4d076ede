"""The README and docs/: short, with links that lead somewhere, and with commands and code that exist and run."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main
from peft import PeftModel

from peft_safety import assert_protected, verify
from peft_safety.cli import app
from peft_safety.recipes.job.fields import table
from peft_safety.recipes.job.options import SafetyOptions
from tests.interop.helpers import readme_code
from tests.tiny import tiny_llama, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]
LONGEST_README = 900


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").split()) <= LONGEST_README


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")) if "://" not in link]
    for link in links:
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_paths_in_the_text_exist() -> None:
    """Of code in backticks, what looks like a path: from the root, from the package, or beside the page."""
    pages = [*PAGES, ROOT / "CHANGELOG.md", *sorted((ROOT / "examples").rglob("*.md"))]
    seen = 0
    for page in pages:
        for path in re.findall(r"`([\w.-]*/[\w./-]*(?:/|\.\w+)|[\w.-]+\.py)`", page.read_text(encoding="utf-8")):
            places = (ROOT, ROOT / "peft_safety", page.parent)
            assert any((place / path).exists() for place in places), f"{page.name}: {path}"
            seen += 1
    assert seen > 20, "paths are seen"


def test_every_page_is_in_the_index() -> None:
    docs = ROOT / "docs"
    index = (docs / "README.md").read_text(encoding="utf-8")
    pages = [page.relative_to(docs).as_posix() for page in PAGES if docs in page.parents]
    assert [page for page in pages if f"]({page})" not in index] == ["README.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_parse_and_import_what_exists(page: Path) -> None:
    for block in blocks(page, "python"):
        compile(block, str(page), "exec")
        for module, names in re.findall(r"^from (peft_safety[\w.]*) import ([\w, ]+)$", block, re.MULTILINE):
            for name in names.split(","):
                assert hasattr(importlib.import_module(module), name.strip()), f"{module}.{name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_their_options_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    lines = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`(peft-safety [^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    commands: Any = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for line in lines:
        words = shlex.split(line, comments=True)
        if words[:1] == ["peft-safety"] and words[1] != "COMMAND":
            pairs = [(*parameter.opts, *parameter.secondary_opts) for parameter in commands[words[1]].params]
            options = {option for pair in pairs for option in pair}
            if words[1] == "train":
                options = {"--config", *(f"--{name}" for name in (*table(), *vars(SafetyOptions())))}
            assert {word for word in words if word.startswith("-")} <= options, line


def test_the_code_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is printed, but on a tiny model, and on the CPU, where TRL's default of bf16 has to be turned off."""
    pytest.importorskip("trl")
    pytest.importorskip("datasets")
    tiny_llama().save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    rows = [{"prompt": f"Color of item {i}?", "completion": " red" if i % 2 else " green"} for i in range(32)]
    (tmp_path / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    exec(compile(readme_code(tmp_path / "tiny"), str(README), "exec"), {})
    assert verify("adapter").method == "GUARDSPACE, frozen A"
    assert_protected(PeftModel.from_pretrained(tiny_llama(), "adapter"))
