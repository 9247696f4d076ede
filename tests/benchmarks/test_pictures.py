"""The pictures of the committed results: no text is small, cut off, or lies on other text."""

import itertools
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from matplotlib.text import Text
from PIL import Image

from benchmarks import attacks_report, attacks_tables, costs_picture, guardspace_report, ops, screening
from benchmarks.common import RESULTS, recorded
from benchmarks.frontier import aggregate, pictures
from benchmarks.frontier.results import read
from benchmarks.method_comparison import report as comparison
from benchmarks.topic import report as topic
from examples.demo_picture import draw as draw_demo
from peft_safety.calibration.coverage import ModuleCoverage, TaskShare
from peft_safety.reporting import coverage, repair, style
from peft_safety.reporting.report import Report

DOCS = Path(__file__).parents[2] / "docs" / "pictures"
LARGEST = 150_000


def lines(name):
    return [json.loads(line) for line in (RESULTS / name).read_text(encoding="utf-8").splitlines()]


def points():
    return aggregate.points(read(RESULTS / "frontier.jsonl")[1])


def attacks(name, path):
    attacks_report.heat(*attacks_report.grid(read(RESULTS / name, "attacks")[1]), path)


def demo(path):
    arms = Report.load(RESULTS / "demo.json").arms
    found = {
        name: SimpleNamespace(refusal=row["refusal, harmful"], task_accuracy=row["task accuracy"])
        for name, row in arms.items()
    }
    draw_demo(found, 0.1, path)


DRAWN = {
    "frontier": lambda path: pictures.frontier(points(), path),
    "frontier_poison": lambda path: pictures.poison(points(), path),
    "costs": lambda path: costs_picture.draw(recorded("train_step")[1], path),
    **{found.stem: partial(attacks, found.name) for found in attacks_tables.results(RESULTS)},
    "guardspace": lambda path: guardspace_report.save_png(read(RESULTS / "guardspace.jsonl", "guardspace")[1], path),
    "topic": lambda path: topic.picture(topic.main_rows(read(RESULTS / "topic.jsonl", "topic")[1]), path),
    **{found.stem: partial(screening.draw, screening.read(found)) for found in screening.results(RESULTS)},
    "method_comparison": lambda path: comparison.draw(
        [r for r in lines("method_comparison.jsonl") if "arm" in r], path
    ),
    "ops_cpu": lambda path: ops.draw(lines("ops_cpu.jsonl")[1:], path),
    "ops_gpu": lambda path: ops.draw(lines("ops_gpu.jsonl")[1:], path),
    "repair": lambda path: Report.load(RESULTS / "repair.json").save_png(path),
    "patch": lambda path: Report.load(RESULTS / "patch.json").save_png(path),
    "fuse": lambda path: Report.load(RESULTS / "fuse.json").save_png(path),
    "demo": demo,
}


def energy(path):
    curve = torch.linspace(0.1, 0.9, 16, dtype=torch.float64)
    task = TaskShare(0.4, 3, 2, 1 - curve * 2 / 3)
    coverage.save_png([ModuleCoverage(f"layers.{i}.q_proj", 64, 16, 0.9, curve, task) for i in range(3)], path)


def cosines(path):
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    rows = [
        SimpleNamespace(name=f"layers.{i}.{kind}", cos=i / 30, selected=i < 11) for i in range(30) for kind in kinds
    ]
    record = {"projection": "frobenius", "select": "threshold", "threshold": 0.35}
    repair.save_png(SimpleNamespace(modules=rows, selected=rows[:77], record=record), path)


MADE = {"energy": energy, "cosines": cosines}
"""Of made-up figures."""


@pytest.mark.parametrize("name", [*DRAWN, *MADE])
def test_text_is_large_whole_and_apart(name, tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(style, "save", lambda canvas, path: kept.append(canvas))
    (DRAWN | MADE)[name](tmp_path / "x.png")
    (canvas,) = kept
    canvas.draw_without_rendering()
    hidden = _beyond(canvas)
    texts = [t for t in canvas.findobj(Text) if t.get_visible() and t.get_text().strip() and id(t) not in hidden]
    assert len(texts) > 5
    assert canvas.get_figwidth() in (style.WIDTH, style.NARROW)
    assert min(text.get_fontsize() for text in texts) >= style.SMALLEST
    boxes = [(text, Text.get_window_extent(text).padded(-1)) for text in texts]  # without the line of an annotation
    wide, high = canvas.bbox.width, canvas.bbox.height
    cut = [t.get_text() for t, box in boxes if box.x0 < 0 or box.y0 < 0 or box.x1 > wide or box.y1 > high]
    assert not cut
    slanted = {id(text) for text in texts if text.get_rotation() % 90}
    overlaps = [
        (one.get_text(), other.get_text())
        for (one, a), (other, b) in itertools.combinations(boxes, 2)
        if a.overlaps(b) and not (id(one) in slanted and id(other) in slanted)
    ]
    assert not overlaps


def _beyond(canvas):
    """Labels of ticks outside of the limits of their axis, which are not drawn."""
    hidden = set()
    for axis in (axis for panel in canvas.axes for axis in (panel.xaxis, panel.yaxis)):
        low, high = sorted(axis.get_view_interval())
        hidden |= {id(tick.label1) for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high}
    return hidden


@pytest.mark.parametrize("path", [*sorted(RESULTS.glob("*.png")), *sorted(DOCS.glob("*.png"))], ids=lambda p: p.name)
def test_committed_pictures_are_small_files_of_one_width(path):
    assert path.stat().st_size < LARGEST
    with Image.open(path) as image:
        assert image.width == style.PIXELS


def test_every_picture_beside_the_results_is_drawn_by_one_of_these():
    assert {path.stem for path in RESULTS.glob("*.png")} == set(DRAWN)
