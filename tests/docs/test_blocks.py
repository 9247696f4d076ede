"""Every code block of the documents runs: in the order of its page, as it is printed, on tiny models."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

from peft_safety import assert_protected, verify
from tests.docs.pages import PAGES, README, Block, blocks, commands, inline, name
from tests.docs.shell import check, check_options
from tests.docs.world import Store, provide

NOT_RUN = 2
"""Blocks that say why no test runs them: they need a GPU, or another framework."""
LANGUAGES = ("python", "bash", "yaml")
SLOW = {"docs/methods/ortho_safety_patch.md"}
WITH_CODE = [
    pytest.param(page, marks=[pytest.mark.slow] if name(page) in SLOW else [], id=name(page))
    for page in PAGES
    if any(block.language in LANGUAGES for block in blocks(page))
]


def run(page: Path, store: Store) -> None:
    """Run the blocks of a page in the current directory."""
    code = [block for block in blocks(page) if block.language in LANGUAGES]
    store.furnish("\n".join(block.code for block in code if not block.reason))
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in code:
        place = f"{name(page)}, line {block.line}"
        try:
            if block.language == "python":
                run_python(block, place, namespace, store)
            elif block.language == "bash":
                for line in commands(block):
                    check(line, run=not block.reason)
            else:
                write_settings(block)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{place}: {type(error).__name__}: {error}") from error


def run_python(block: Block, place: str, namespace: dict[str, Any], store: Store) -> None:
    """Run it; of one that is not run, import what it takes from this package."""
    tree = ast.parse("\n" * (block.line - 1) + block.code, place)
    if block.reason:
        tree.body = [
            node for node in tree.body if isinstance(node, ast.ImportFrom) and "peft_safety" in str(node.module)
        ]
    else:
        provide(block.code, namespace, store)
    exec(compile(tree, place, "exec"), namespace)


def write_settings(block: Block) -> None:
    """Settings of a job, for the commands below them: into the file that their first line names, or job.yaml."""
    settings, file = yaml.safe_load(block.code), re.match(r"# (\S+\.ya?ml)", block.code)
    if file or "model_name_or_path" in settings:
        Path(file[1] if file else "job.yaml").write_text(block.code, encoding="utf-8")


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("page", WITH_CODE)
def test_the_code_of_a_page_runs(page: Path, store: Store) -> None:
    run(page, store)
    if page == README:
        assert verify("adapter").method == "GUARDSPACE, frozen A"
        assert_protected(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(store.aligned), "adapter"))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_in_the_text_have_these_options(page: Path) -> None:
    for code in inline(page):
        if code.startswith("peft-safety "):
            check_options(code)


def test_blocks_that_are_not_run_are_few() -> None:
    reasons = [(name(page), block.line, block.reason) for page in PAGES for block in blocks(page) if block.reason]
    assert len(reasons) <= NOT_RUN, reasons
