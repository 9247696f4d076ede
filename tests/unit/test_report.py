from __future__ import annotations

import json
import struct
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch
from packaging.version import Version

from peft_safety.cli.common import fail
from peft_safety.core.environment import versions
from peft_safety.errors import ConfigError, DataError
from peft_safety.evaluation.metrics import Mean, Rate
from peft_safety.reporting import render, style
from peft_safety.reporting.report import Report, environment


@pytest.fixture
def report():
    return Report(
        title="A | test",
        arms={
            "before": {"refusal": Rate(9, 10), "NLL": Mean.of([1.0, 2.0])},
            "after": {"refusal": Rate(3, 12), "NLL": Mean.of([3.0]), "accuracy": Rate(4, 4)},
        },
        notes=("Judge: keyword.",),
        environment=environment(seed=3, model="m"),
        details={"poison": 0.1},
    )


def test_json_round_trip(report, tmp_path):
    path = report.save(tmp_path / "deep" / "report.json")
    back = Report.load(path)
    assert back.to_json() == json.loads(path.read_text()) == report.to_json()
    assert back.card() == report.card()


def test_every_figure_has_its_n_and_interval(report):
    headings, _, first, *_ = [line for line in report.card().splitlines() if line.startswith("|")]
    assert headings == "|  | refusal (N=10-12) | NLL (N=1-2) | accuracy (N=4) |"
    assert first == "| before | 90 % [60, 98] | 1.50 [0.52, 2.48] | - |"


def test_table_shows_everything(report, capsys):
    report.print()
    text = capsys.readouterr().out
    for part in ("A | test", "before", "after", "90 % [60, 98]", "Judge: keyword.", "95 % intervals"):
        assert part in text


@pytest.mark.parametrize("arms", [1, 2, 3, 4, 8])
def test_printed_tables_fit_80_columns_and_hold_every_figure(arms, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    figures = {
        "over-refusal, everyday": Rate(60, 60),
        "general NLL": Mean.of([0.6, 0.8, 0.7]),
        "task accuracy": Rate(11, 60),
        "over-refusal, packaged-everyday, in context, by embedding": Rate(1, 100),
    }
    names = [f"arm number {index}" for index in range(arms)]
    Report("A title", {name: figures for name in names}, ("A note of some length. " * 6,)).print()
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    if Version(version("rich")) >= Version("15") or arms > 1:  # before, it breaks the lines of a lone column
        assert all(name in text for name in names)
        assert text.count("100 % [94, 100]") >= arms
        assert text.count("0.70 ± 0.11") >= arms
    assert lines[1].split()[0] == "N"


def test_arms_of_any_length_are_shown_whole(capsys):
    Report(
        "t",
        {
            "first": {"refusal": Rate(1, 2)},
            "a very long name of an arm that no column is wide enough for, really": {"refusal": Rate(2, 2)},
        },
    ).print()
    assert "100 %" in capsys.readouterr().out


def test_a_long_heading_is_wrapped_so_that_two_arms_fit_80_columns(capsys):
    heading = "over-refusal, packaged-everyday, under the system prompt, by classifier:rejection"
    Report("title", {arm: {heading: Rate(72, 72)} for arm in ("base", "mine", "other")}).print()
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert all(word in out for word in heading.split())


def test_dollar_signs_in_names_are_no_formulas(tmp_path):
    arms = {"$x_{^$": {"refusal, $a$b^$": Rate(1, 2)}}
    assert Report("cost $^$", arms, ("$_$",)).save_png(tmp_path / "report.png").stat().st_size > 1000


def test_long_names_leave_room_for_the_panels(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(style, "save", lambda canvas, path: kept.append(canvas))
    arms = {"runs/" + "x" * 90: {"m" * 60: Rate(1, 2), "n" * 60: Rate(1, 2), "o": Rate(0, 2)}}
    Report("t", arms).save_png(tmp_path / "report.png")
    kept[0].draw_without_rendering()
    assert min(panel.get_window_extent().width for panel in kept[0].axes) > 0.15 * kept[0].bbox.width


def test_card_is_a_markdown_table(report):
    lines = report.card().splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 4
    assert len({line.count("|") for line in table}) == 1
    assert "- Judge: keyword." in lines
    assert "seed 3" in report.card()


def test_png_is_a_legible_picture(report, tmp_path):
    content = report.save_png(tmp_path / "report.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", content[16:24])
    assert width > 800
    assert height > 250


@pytest.mark.parametrize("missing", [("matplotlib", "matplotlib.figure"), ("matplotlib.figure",)])
def test_without_matplotlib_the_figures_are_saved_all_the_same(report, tmp_path, monkeypatch, missing):
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.warns(UserWarning, match="no report.png: .*pip install"):
        report.write(tmp_path)
    assert Report.load(tmp_path / "report.json") == report
    with pytest.raises(ConfigError, match="matplotlib"):
        report.save_png(tmp_path / "report.png")


@pytest.mark.parametrize("arms", [{}, {"before": {}}])
def test_an_empty_report_is_refused(arms):
    with pytest.raises(DataError, match="no figures"):
        Report("t", arms)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"title": "t", "arms": {"a": {"m": {"k": 4, "n": 3}}}, "notes": [], "environment": {}, "details": {}}',
    ],
)
def test_malformed_reports_are_refused(tmp_path, content):
    path = tmp_path / "report.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"report\.json that peft-safety wrote"):
        Report.load(path)


def test_environment_names_versions_and_seed():
    found = environment(seed=7, device="cpu")
    assert found["seed"] == 7
    assert found["device"] == "cpu"
    assert {"python", "torch", "transformers", "peft"} <= set(found)


def test_a_layer_of_a_class_without_a_module_has_no_version():
    made = torch.nn.Sequential(type("Made", (torch.nn.Module,), {"__module__": None})())
    assert versions(made) == versions()


def test_text_is_never_read_as_markup(capsys):
    table = render.table(["[b]x", ":smile:"], [["[/x]", "[bold]1"], ["[link=y]", "2"]])
    render.show("[/title]", table, notes=["[red]note", "\x1b[2J\x9b31m\x07"])
    with pytest.raises(SystemExit) as ended:
        fail(DataError("[/x] in a file"), code=2)
    assert ended.value.code == 2
    printed = capsys.readouterr()
    for text in ("[b]x", ":smile:", "[/x]", "[bold]1", "[link=y]", "[/title]", "[red]note", r"\x1b[2J\x9b31m\x07"):
        assert text in printed.out
    assert "DataError: [/x] in a file" in printed.err


@pytest.mark.parametrize("name", ["\u65e5\u672c\u8a9e" * 15, "a\tb", "\x1b[31m" * 9], ids=["wide", "tab", "control"])
def test_no_figure_is_cut_off_beside_a_name_of_wide_or_control_characters(capsys, name):
    heads = ["module", "z", *(f"overlap with\n{name}{index}" for index in range(3))]
    rows = [[label, *(f"{line}{column}.125" for column in range(4))] for line, label in enumerate([name, "q_proj"], 1)]
    render.show("title", *render.tables(heads, rows))
    out = capsys.readouterr().out
    assert "\N{HORIZONTAL ELLIPSIS}" not in out
    assert all(figure in out for row in rows for figure in row[1:])


def test_importing_the_report_is_light():
    heavy = ("matplotlib", "torch", "transformers", "rich")
    code = f"import sys, peft_safety.reporting.report; print([m for m in {heavy} if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_more_than_three_panels_take_further_rows(tmp_path):
    shapes = []
    for count in (3, 5, 6):
        row = {f"metric {n}": Rate(n, 9) for n in range(count)}
        path = Report("many", {"one": row, "two": row}).save_png(tmp_path / f"{count}.png")
        shapes.append(struct.unpack(">II", path.read_bytes()[16:24]))
    (width, height), five, six = shapes
    assert five == six
    assert six[0] == width
    assert six[1] > 1.5 * height
