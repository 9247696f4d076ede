"""The pages of results: written by the harness alone, whole, short, and with prose that says what their tables say."""

import re
import shutil
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.common import RESULTS
from benchmarks.frontier import report as frontier_report
from benchmarks.pages import DOCS, Section, written
from peft_safety.errors import DataError

PAGES = sorted((DOCS / "results").glob("*.md"))
LONGEST, NUMBER = 200, r"\d+(?:\.\d+)?"
GOALS = {"demo.md": {"90"}}
"""Figures of prose that are no results."""
ELSEWHERE = ("peft_suite",)
"""Results files with a writer of their own."""


def generated(text: str) -> list[str]:
    return [found[1] for found in re.findall(r"<!-- (\w+):begin -->(.*?)<!-- \1:end -->", text, re.DOTALL)]


def prose(text: str) -> str:
    """The hand-written part, without code and the targets of links."""
    text = re.sub(r"<!-- (\w+):begin -->.*?<!-- \1:end -->", "", text, flags=re.DOTALL)
    return re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", "", text, flags=re.DOTALL)


def figures(text: str) -> set[str]:
    """Numbers of per cent and points, also in lists ("71 and 72 %"), and all with a decimal point."""
    joined = rf"{NUMBER}(?:(?:,|,? and|,? or|,? to)\s+{NUMBER})*"
    counted = re.findall(rf"({joined})\s*(?:%|points?\b)", text)
    return {number for one in counted for number in re.findall(NUMBER, one)} | set(
        re.findall(r"(?<![\w.])\d+\.\d+(?![\w.]\w)", text)
    )


def test_the_committed_pages_are_those_of_the_committed_results() -> None:
    files = report.current()
    stale = [path.name for path, text in files.items() if path.read_text(encoding="utf-8") != text]
    assert not stale, "run python -m benchmarks.report"
    assert {*PAGES, *RESULTS.glob("*.html")} <= files.keys(), "every page has a section"


def test_every_results_file_is_on_a_page() -> None:
    said = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    files = [path for path in RESULTS.glob("*.json*") if path.stem not in ELSEWHERE]
    absent = [path.name for path in files if f"results/{path.name}" not in said]
    assert [name for name in absent if not re.match(r"attacks|screening", name)] == []
    assert len(files) > 20


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_is_short_and_its_prose_says_what_its_tables_say(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGEST
    assert not re.search(r"^\|.*\d", prose(text), re.MULTILINE), "a table of figures that no report writes"
    known = set(re.findall(NUMBER, " ".join(generated(text)))) | GOALS.get(page.name, set()) | {"95"}
    assert figures(prose(text)) - known == set()


def test_figures_of_prose() -> None:
    assert figures("keeps 71 and 72 % (of 9.5 %), 3 points, 12, 13 or 14 %; not 320 steps") == set(
        ["71", "72", "9.5", "3", "12", "13", "14"]
    )


def test_a_section_goes_between_its_markers(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("a\n<!-- x:begin -->old<!-- x:end -->\n<!-- y:begin --><!-- y:end -->\nb\n")
    sections = [Section(name, "page.md", lambda folder, page, name=name: f"{name} \\1\n") for name in "xy"]
    (text,) = written(sections, tmp_path, tmp_path).values()
    assert text == "a\n<!-- x:begin -->\nx \\1\n<!-- x:end -->\n<!-- y:begin -->\ny \\1\n<!-- y:end -->\nb\n"
    with pytest.raises(DataError, match="lacks the markers <!-- z:begin -->"):
        written([Section("z", "page.md", lambda folder, page: "")], tmp_path, tmp_path)


def test_the_command_writes_what_is_named(tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "page.md"
    page.write_text("<!-- x:begin --><!-- x:end -->\n<!-- y:begin --><!-- y:end -->\n")
    sections = [Section(name, "page.md", lambda folder, page, name=name: name) for name in "xy"]
    monkeypatch.setattr(report, "SECTIONS", sections)
    monkeypatch.setattr(report, "DOCS", tmp_path / "docs")
    before = page.read_text()
    assert report.main(["--check"]) == 1
    assert page.read_text() == before, "a check writes nothing"
    assert report.main(["x"]) == 0
    assert page.read_text() == "<!-- x:begin -->\nx\n<!-- x:end -->\n<!-- y:begin --><!-- y:end -->\n"
    assert report.main([]) == report.main(["--check"]) == 0
    assert capsys.readouterr().out.endswith("1 files, 0 changed\n")
    with pytest.raises(SystemExit):
        report.main(["z"])
    assert "no section z" in capsys.readouterr().err


def test_frontier_html_is_checked_against_the_lines_and_pictures_beside_it(tmp_path, monkeypatch, capsys) -> None:
    for name in ("frontier.jsonl", "frontier.html", "frontier.png", "frontier_poison.png"):
        shutil.copy(RESULTS / name, tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "page.md").write_text("<!-- frontier:begin -->\nx\n<!-- frontier:end -->")
    monkeypatch.setattr(report, "SECTIONS", [Section("frontier", "page.md", lambda folder, page: "x")])
    monkeypatch.setattr(report, "DOCS", tmp_path / "docs")
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "pictures", lambda: frontier_report.report(tmp_path, None))
    assert report.main(["--check"]) == 0
    lines = (tmp_path / "frontier.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "frontier.jsonl").write_text("".join(line for line in lines if '"arm": "lora"' not in line))
    assert report.main(["--check"]) == 1
    assert "would change frontier.html" in capsys.readouterr().out
    assert report.main([]) == report.main(["--check"]) == 0
    shutil.copy(tmp_path / "frontier.png", tmp_path / "frontier_poison.png")
    assert report.main(["--check"]) == 1, "it holds another picture"
    (tmp_path / "frontier.html").unlink()
    (tmp_path / "frontier.png").unlink()
    assert report.main([]) == 1
    assert "lacks frontier.png" in capsys.readouterr().err
    assert report.main(["--pictures"]) == report.main(["--check"]) == 0


@pytest.mark.parametrize("section", report.SECTIONS, ids=lambda section: section.name)
def test_a_section_without_results_says_so(section: Section, tmp_path: Path) -> None:
    try:
        said = section.text(tmp_path, tmp_path / "page.md")
    except DataError as error:
        said = str(error)
    assert str(tmp_path) in said or "ot run" in said
