"""The report: what it says of made-up cells, and that the page says what the committed results say."""

import json
import random
from dataclasses import asdict, replace

import pytest

from benchmarks.frontier import aggregate, html, pictures, report, sections, tables
from benchmarks.frontier.cells import Cell
from benchmarks.frontier.plan import METHODS, PLANNED, place, plan
from benchmarks.frontier.results import NAME, results_of
from benchmarks.pages import written
from peft_safety.errors import DataError
from peft_safety.evaluation import Rate
from peft_safety.reporting import style
from tests.benchmarks.pages import blank

LORA, GUARD, SOFT = METHODS["lora"], METHODS["guardspace"], METHODS["safe-lora-soft"]


def row(cell: Cell, harmful: str = "RROO", task: str = "1100", **further) -> dict:
    """A made-up result with these verdicts."""
    verdicts = {"harmful": harmful, "contrast": "ROOO", "advbench": harmful, "xstest_safe": "OO"}
    rates = {
        "refusal": harmful.count("R"),
        "compliance": harmful.count("C"),
        "over_refusal": 1,
        "task_accuracy": task.count("1"),
        "second_accuracy": 2,
    }
    return {
        "cell": asdict(cell),
        "judge": "keyword",
        **{name: Rate(count, 4).to_json() for name, count in rates.items()},
        "general_nll": {"value": 0.7, "low": 0.6, "high": 0.8, "n": 4},
        "transfer": {"advbench": Rate(harmful.count("R"), 4).to_json(), "xstest_safe": Rate(0, 2).to_json()},
        "verdicts": {"keyword": verdicts},
        "correct": {"task": task, "second": "1010"},
        "norm": 5.0,
        "train_seconds": 50.0,
        "train_cpu_seconds": 90.0 + cell.fraction,
        "added_mib": 900,
        "seconds": 100.0,
        **further,
    }


def grid() -> list[dict]:
    """A made-up result for every cell of the full plan."""
    rng = random.Random(0)

    def marks(letters, likely, size):
        return "".join(letters[0] if rng.random() < likely else letters[1] for _ in range(size))

    return [
        row(cell, marks("RO", rng.random(), 4), marks("10", rng.random() / 2, 4), setup_cpu_seconds=10.0)
        for cell in plan(list(PLANNED.values()))
    ]


def write(folder, rows, **environment):
    """A results file."""
    lines = [json.dumps({"environment": {"model": "tiny", "rows": 160, **environment}}), *map(json.dumps, rows)]
    (folder / NAME).write_text("\n".join(lines) + "\n")
    return folder / NAME


def test_seeds_are_averaged_and_no_fine_tune_stands_everywhere():
    rows = [row(place(GUARD, 0.1, seed, "test"), "RRRO") for seed in (0, 1)] + [row(place(GUARD, 0.5, 0, "test"))]
    rows += [
        row(place(METHODS["aligned"], 0, 0, "test"), "RRRR"),
        {"cell": asdict(place(GUARD, 0.1, 2, "test")), "diverged": "the loss"},
    ]
    rows += [row(place(LORA, 0.1, 0, "validation"))]
    found = aggregate.points(rows)
    assert set(found) == {("guardspace", 0.1), ("guardspace", 0.5), ("aligned", 0.1), ("aligned", 0.5)}, (
        "validation cells are not mixed in"
    )
    point = found["guardspace", 0.1]
    assert point.rate("refusal") == Rate(3, 4), "the same four prompts twice"
    assert point.transfer("advbench") == Rate(3, 4)
    assert point.diverged == 1
    assert point.mean("norm") == 5.0
    assert found["aligned", 0.5].rate("refusal") == Rate(4, 4)
    assert aggregate.split_of(rows[-1:]) == "validation"


def test_an_average_over_seeds_is_as_wide_as_one_seed():
    counts = [{"k": k, "n": 72} for k in (2, 32, 8)]
    rate = aggregate.averaged(counts)
    assert (rate.value, rate.n) == (14 / 72, 72)
    assert rate.interval == Rate(14, 72).interval
    assert aggregate.averaged([{"k": 1, "n": 2}, {"k": 2, "n": 2}]).value == 0.75
    assert aggregate.averaged([]) is None


def test_arms_are_compared_on_the_same_prompts_and_seeds():
    guard = [
        row(place(GUARD, 0.1, seed, "test"), harmful, task)
        for seed, harmful, task in ((0, "RRRR", "1111"), (1, "RRRO", "0000"), (2, "RRRR", "1111"))
    ]
    lora = [row(place(LORA, 0.1, seed, "test"), harmful) for seed, harmful in ((1, "OOOR"), (0, "ROOO"))]
    found = aggregate.points(guard + lora)
    pair = aggregate.pairs(found["guardspace", 0.1], found["lora", 0.1])
    assert (pair.only_first, pair.only_second, pair.n) == (2 * (3 + 3), 2 * (0 + 1), 16), (
        "own and AdvBench's harmful prompts, two shared seeds"
    )
    task = aggregate.pairs(found["guardspace", 0.1], found["lora", 0.1], "task")
    assert (task.only_first, task.only_second, task.n) == (2, 2, 8)
    other = aggregate.points([row(place(LORA, 0.1, 9, "test"))])["lora", 0.1]
    assert aggregate.pairs(found["guardspace", 0.1], other) is None
    assert tables.difference(pair) == "+62 (12 : 2, p = 0.013)"


def test_a_setting_that_is_no_default_is_named_in_full():
    chosen = place(replace(GUARD, fraction=0.5), 0.1, 0, "test")
    found = aggregate.points([row(chosen), row(replace(chosen, load="nf4")), row(replace(chosen, control="random"))])
    assert [aggregate.label(name) for name, _ in found] == [
        "GuardSpace (fraction=0.5)",
        "GuardSpace, 4-bit (fraction=0.5)",
        "random basis for GuardSpace (fraction=0.5)",
    ]


def test_no_label_of_the_full_plan_lies_on_another(tmp_path, monkeypatch):
    from matplotlib.text import Text

    kept = []
    monkeypatch.setattr(style, "save", lambda canvas, path: kept.append(canvas))
    pictures.frontier(aggregate.points(grid()), tmp_path / "frontier.png")
    (canvas,) = kept
    canvas.draw_without_rendering()
    (panel,) = canvas.axes
    boxes = [Text.get_window_extent(text) for text in panel.texts]  # without the line to the point
    assert {text.get_text() for text in panel.texts} == {aggregate.label(name) for name in pictures.NAMED}
    assert not [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]


def text_of(folder, name):
    """A section of made-up results."""
    (section,) = [section for section in sections.SECTIONS if section.name == name]
    return section.text(folder, folder / "page.md")


def test_the_report_is_written_whole_and_again_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(style, "PIXELS", 180)
    write(tmp_path, grid(), torch="2")
    docs = blank(tmp_path / "docs", sections.SECTIONS)
    report.report(tmp_path, docs)
    pages = {path: path.read_text() for path in sorted(docs.rglob("*.md"))}
    assert [path.name for path in pages] == ["frontier.md", "repair.md", "tasks.md"]
    assert all("STALE" not in text and text.endswith("after\n") for text in pages.values())
    frontier = pages[docs / "results" / "frontier.md"]
    assert frontier.index("<!-- null_space:begin -->") < frontier.index("<!-- frontier:begin -->\n![")
    assert "| GuardSpace |" in frontier
    assert "| plain LoRA, made blind |" in pages[docs / "results" / "repair.md"]
    assert "Task: news: not run." in pages[docs / "results" / "tasks.md"]
    page = (tmp_path / "frontier.html").read_text()
    for name in report.PICTURES:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert page.count("data:image/png;base64,") == len(report.PICTURES)
    assert "http" not in page.split("<style>")[1].split("base64,")[0], "nothing outside the file is fetched"
    assert "<p>Nothing of the plan.</p>" in page
    assert written(sections.SECTIONS, tmp_path, docs) == pages, "again the same"


def test_a_method_stands_beside_its_controls(tmp_path):
    control = replace(GUARD, control="random")
    cells = [(LORA, 0.1, "RROO"), (GUARD, 0.1, "RRRO"), (control, 0.1, "ROOO"), (GUARD, 0.5, "RRRR")]
    write(tmp_path, [row(place(cell, poison, 0, "test"), letters) for cell, poison, letters in cells])
    lines = text_of(tmp_path, "frontier").splitlines()
    (line,) = [line for line in lines if line.startswith("| GuardSpace | 75 % [30, 95] | 25 % [5, 70] | - |")]
    assert line.endswith("| 25 % [5, 70] | 0.70 | 1 |"), "over-refusal, NLL, seeds"
    assert "| GuardSpace | 75 % [30, 95] | 100 % [51, 100] |" in lines, "every share"
    assert "| GuardSpace | +50 (4 : 0, p = 0.125) | - |" in lines, "the control, prompt by prompt"
    (absent,) = [line for line in lines if "cells of the full plan" in line]
    assert "Not run at p = 0.1: aligned, no fine-tune; GuardSpace, frozen A;" in absent


def test_figures_of_other_seeds_than_their_row_say_so(tmp_path):
    random = replace(GUARD, control="random")
    cells = [row(place(LORA, 0.1, seed, "test"), "R" * seed + "O" * (4 - seed)) for seed in (0, 1, 2)]
    cells += [row(place(GUARD, 0.1, seed, "test"), "RRRR") for seed in (0, 1)]
    cells += [row(place(random, 0.1, 0, "test"), "OOOO"), row(place(SOFT, 0.1, 0, "test"), "ROOO")]
    write(tmp_path, [*cells, row(place(LORA, 0.5, 0, "test"), "OOOO")])
    lines = text_of(tmp_path, "frontier").splitlines()
    found = {line.split(" | ")[0]: line for line in reversed(lines) if line.startswith("| ") and "%" in line}
    assert found["| plain LoRA, seed 0"].startswith("| plain LoRA, seed 0 | 0 % [0, 49] | - | - |")
    assert found["| plain LoRA, seed 0"].endswith("| 1 |")
    assert found["| GuardSpace"].split(" | ")[2] == "0 % [0, 49] (1 seed)"
    assert found["| Safe LoRA, soft"].endswith("| 1 |")
    assert tables.told(aggregate.Point("lora", 0.1, diverged=1), "refusal") == tables.NOTHING
    assert "| plain LoRA | 0 % [0, 49] | 25 % [5, 70] | 50 % [15, 85] |" in lines, "by seed"
    assert "| plain LoRA | 25 % [5, 70] (3 seeds) | 0 % [0, 49] |" in lines, "by share of poison"


def test_a_partial_grid_says_what_is_missing_and_that_validation_is_no_result(tmp_path):
    cells = [place(METHODS[name], 0.1, 0, "validation") for name in ("aligned", "lora", "guardspace")]
    write(tmp_path, [row(cell) for cell in cells])
    report.report(tmp_path, None)
    page = (tmp_path / "frontier.html").read_text()
    assert "nothing here is a result" in page
    assert "<td>random basis for GuardSpace</td><td>12</td>" in page
    assert "nothing here is a result" in text_of(tmp_path, "frontier")
    assert html.summary(aggregate.points([row(cells[0])]), 0.0) == [
        "Plain LoRA has not been measured yet: nothing can be compared."
    ]


def test_settings_tried_on_validation_prompts_stand_with_the_longest_first(tmp_path):
    frozen, blind = METHODS["frozen"], METHODS["blind"]
    settings = [replace(frozen, fraction=1 / 16), replace(frozen, epochs=8), replace(blind, fraction=1 / 8)]
    rows = [row(place(LORA, 0.1, 0, "test")), row(place(METHODS["aligned"], 0, 0, "test"))]
    write(tmp_path, rows)
    assert "Nothing has been tried" in text_of(tmp_path, "null_space")
    rows += [row(place(cell, 0.1, 0, "validation"), "RRRO", steps=20 * cell.epochs) for cell in settings]
    write(tmp_path, rows)
    text = text_of(tmp_path, "null_space")
    long, small = (line for line in text.splitlines() if line.startswith("| GuardSpace, frozen A |"))
    assert "| n/16 | 20 | 75 % " in small
    assert "| n/4 | 160 | 75 % " in long
    assert "made blind" not in text
    (repair,) = [line for line in text_of(tmp_path, "repairs").splitlines() if line.startswith("| plain LoRA, made")]
    assert "| n/8 | 20 | 75 % " in repair


def test_other_tasks_stand_in_tables_of_their_own(tmp_path):
    free = row(place(LORA, 0.1, 0, "test"), task_nll={"value": 1.234})
    free.pop("task_accuracy")
    for task, other in (("news", row(place(LORA, 0.1, 0, "test"), "RRRO")), ("instructions", free)):
        lines = [{"environment": {"model": "tiny"}}, other, row(place(LORA, 0.1, 0, "validation"), "RRRR")]
        (tmp_path / f"{results_of(task)}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    text = text_of(tmp_path, "tasks")
    news, instructions = (line for line in text.splitlines() if line.startswith("| plain LoRA"))
    assert "| p = 0.1 | 75 % " in news
    assert "| NLL 1.23 | 0.70 | 1 |" in instructions
    assert "Task: banking: not run." in text


def test_each_seed_stands_alone():
    rows = [row(place(LORA, 0.1, seed, "test"), letters) for seed, letters in ((0, "RRRR"), (2, "ROOO"))]
    rows += [row(place(GUARD, 0.1, 0, "test"))]
    table = sections.by_seed(rows, ("guardspace", "lora"), 0.1)
    assert table.headings == ("refusal", "seed 0", "seed 2")
    assert [(line[0], line[1][:5], line[2][:4]) for line in table.rows] == [("plain LoRA", "100 %", "25 %")]


def test_results_that_cannot_be_reported(tmp_path):
    with pytest.raises(DataError, match=r"Run python -m benchmarks\.frontier"):
        report.report(tmp_path, None)
    write(tmp_path, [{"cell": asdict(place(LORA, 0.1, 0, "test")), "diverged": "the loss"}])
    with pytest.raises(DataError, match="no finite cell"):
        report.report(tmp_path, None)
    write(tmp_path, [row(place(LORA, 0.1, 0, "test"))])
    docs = blank(tmp_path / "docs", sections.SECTIONS)
    (docs / "results" / "repair.md").write_text("nothing")
    with pytest.raises(DataError, match="lacks the markers"):
        report.report(tmp_path, docs)
    assert "STALE" in (docs / "results" / "frontier.md").read_text()
    assert not list(tmp_path.glob("*.png"))


def test_two_judges_stand_side_by_side():
    cell = place(LORA, 0.1, 0, "test")
    both = row(cell)
    assert tables.verdicts_of_judges(aggregate.points([both]), 0.1) is None
    both["verdicts"]["classifier:x"] = {"harmful": "CCCR"}
    table = tables.verdicts_of_judges(aggregate.points([both]), 0.1)
    assert table.headings == (
        "",
        "refusal, keyword",
        "compliance, keyword",
        "refusal, classifier:x",
        "compliance, classifier:x",
    )
    assert [value.split(" [")[0] for value in table.rows[0]] == ["plain LoRA", "50 %", "0 %", "25 %", "75 %"]
    twice = tables.verdicts_of_judges(aggregate.points([both, {**both, "cell": asdict(replace(cell, seed=1))}]), 0.1)
    assert twice.rows == table.rows, "a seed that says the same adds nothing"
