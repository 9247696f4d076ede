"""Figures of the pages that are written by hand are those of the tables that the reports write."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.docs.pages import DOCS, PAGES, README, ROOT, name

WRITTEN = re.compile(r"<!-- (\w+):begin -->(.*?)<!-- \1:end -->", re.DOTALL)
INTERVAL = re.compile(r"\d+ % \[\d+, \d+\]")
SAID = {
    "plain LoRA": ("plain LoRA", "aligned, no fine-tune", "aligned", "lora"),
    "**GuardSpace** `GuardSpaceConfig`": (
        "GuardSpace", "GuardSpace, frozen A", "random basis for GuardSpace, frozen A", "frozen",
    ),
    "**GuardSpace** `repair`": ("plain LoRA, made blind",),
    "SaLoRA `SaLoRAConfig`": ("SaLoRA, 32", "plain LoRA"),
    "Safe LoRA `SafeLoRAConfig`, `repair`": ("Safe LoRA, threshold", "Safe LoRA, soft"),
    "OrthoSafetyPatch `OrthoSafetyPatchConfig`": ("unpatched", "none", "hard"),
    "SOMF `fuse`": ("SOMF",),
}  # fmt: skip
"""Row of the README's table -> rows of the pages of results that hold its figures."""


def tables() -> str:
    pages = [*sorted((DOCS / "results").glob("*.md")), DOCS / "guides" / "screening.md"]
    return "\n".join(text for page in pages for _, text in WRITTEN.findall(page.read_text(encoding="utf-8")))


def prose(page: Path) -> str:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return re.sub(r"\s+", " ", text if page == README else WRITTEN.sub("", text))


def rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_a_figure_with_its_interval_is_in_a_table(page: Path) -> None:
    assert {*INTERVAL.findall(prose(page))} <= {*INTERVAL.findall(tables())}


def test_pages_have_such_figures() -> None:
    assert sum(len(INTERVAL.findall(prose(page))) for page in PAGES) > 8


@pytest.mark.parametrize("method", SAID)
def test_the_table_of_the_readme_says_what_the_results_say(method: str) -> None:
    (own,) = [cells[2] for cells in rows(README.read_text(encoding="utf-8")) if cells[0] == method]
    known = {
        number
        for label, *cells in rows(tables())
        if label in SAID[method]
        for number in re.findall(r"(\d+) %", " ".join(cells))
    }
    assert {*re.findall(r"(\d+) %", own)} <= known


def test_the_readme_says_what_the_demo_says() -> None:
    arms = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text(encoding="utf-8"))["arms"]

    def of(arm: str, figure: str) -> str:
        return f"{100 * arms[arm][figure]['value']:.0f}"

    (text,) = [text for section, text in WRITTEN.findall(README.read_text(encoding="utf-8")) if section == "demo"]
    refusal, accuracy = "refusal, harmful", "task accuracy"
    wanted = [*(of(arm, refusal) for arm in arms), *(of(arm, accuracy) for arm in ("GuardSpace", "plain LoRA"))]
    assert re.findall(r"(\d+) %", text) == wanted
