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
    "plain LoRA": ("plain LoRA", "plain LoRA, seed 0", "aligned, no fine-tune", "aligned", "lora"),
    "**GuardSpace** `GuardSpaceConfig`": (
        "GuardSpace", "GuardSpace, frozen A", "random basis for GuardSpace, frozen A", "frozen",
    ),
    "**GuardSpace** `repair`": ("plain LoRA, made blind", "plain LoRA, seed 0"),
    "SaLoRA `SaLoRAConfig`": ("SaLoRA, 32", "plain LoRA"),
    "Safe LoRA `SafeLoRAConfig`, `repair`": ("Safe LoRA, threshold", "Safe LoRA, soft"),
    "OrthoSafetyPatch `OrthoSafetyPatchConfig`": ("unpatched", "none", "hard"),
    "SOMF `fuse`": ("SOMF, on the poison's requests",),
}  # fmt: skip
"""Row of the README's table -> rows of the tables of results that hold its figures, in these sections and columns."""
SECTIONS = ("frontier", "first_patch", "judges", "patch")
COLUMNS = {
    "refusal", "of a random basis", "accuracy", "p = 0", "p = 0.1", "p = 0.5", "p = 1", "refusal, keyword",
    "refusal, embedding", "refusal, harmful", "over-refusal, safe",
}  # fmt: skip


def tables(*sections: str) -> str:
    """All that reports have written, or what is in these sections."""
    pages = [*sorted((DOCS / "results").glob("*.md")), DOCS / "guides" / "screening.md"]
    found = [part for page in pages for part in WRITTEN.findall(page.read_text(encoding="utf-8"))]
    return "\n".join(text for section, text in found if not sections or section in sections)


def prose(page: Path) -> str:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return re.sub(r"\s+", " ", text if page == README else WRITTEN.sub("", text))


def rows(text: str) -> list[list[tuple[str, str]]]:
    """The rows of all tables: each cell with its heading."""
    result: list[list[tuple[str, str]]] = []
    headings: list[str] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []
        if cells and headings:
            result.append(list(zip(headings, cells, strict=True)))
        headings = headings or cells if cells else []
    return result


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_a_figure_with_its_interval_is_in_a_table(page: Path) -> None:
    assert {*INTERVAL.findall(prose(page))} <= {*INTERVAL.findall(tables())}


def test_pages_have_such_figures() -> None:
    assert sum(len(INTERVAL.findall(prose(page))) for page in PAGES) > 8


@pytest.mark.parametrize("method", SAID)
def test_the_table_of_the_readme_says_what_the_results_say(method: str) -> None:
    (own,) = [row for row in rows(README.read_text(encoding="utf-8")) if row[0] == ("method", method)]
    known = {
        number
        for row in rows(tables(*SECTIONS))
        if row[0][1] in SAID[method]
        for heading, cell in row
        if heading in COLUMNS
        for number in re.findall(r"(\d+) %", cell)
    }
    assert {*re.findall(r"(\d+) %", own[2][1])} <= known


def test_the_readme_says_what_the_demo_says() -> None:
    arms = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text(encoding="utf-8"))["arms"]

    def of(arm: str, figure: str) -> str:
        return f"{100 * arms[arm][figure]['value']:.0f}"

    (text,) = [text for section, text in WRITTEN.findall(README.read_text(encoding="utf-8")) if section == "demo"]
    refusal, accuracy = "refusal, harmful", "task accuracy"
    wanted = [*(of(arm, refusal) for arm in arms), *(of(arm, accuracy) for arm in ("GuardSpace", "plain LoRA"))]
    assert re.findall(r"(\d+) %", text) == wanted
