"""The style of all pictures: colors that color-blind readers tell apart, legible text, places of labels."""

import itertools
import sys

import numpy as np
import pytest
from PIL import Image

from benchmarks.frontier.aggregate import label
from benchmarks.frontier.plan import METHODS
from peft_safety.errors import ArtifactError, ConfigError, MissingPackageError
from peft_safety.reporting import style

VISION = {
    "usual": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
"""What linear sRGB becomes: Machado, Oliveira and Fernandes 2009, severity 1."""
TOLD_APART = 12
"""CIELAB distance; about 2 is just noticed."""


def lab(color, vision):
    values = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    seen = np.array(vision) @ np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = np.array(to_xyz) @ seen.clip(0, 1) / [0.9505, 1.0, 1.089]
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("vision", VISION.values(), ids=VISION)
def test_every_reader_tells_the_methods_apart(vision):
    colors = {method: lab(color, vision) for method, (color, _) in style.METHODS.items()}
    near = {
        (one, other): float(np.linalg.norm(colors[one] - colors[other]))
        for one, other in itertools.combinations(colors, 2)
    }
    assert min(near.values()) > TOLD_APART, min(near, key=near.get)


def test_a_method_has_one_color_by_its_key_its_name_and_as_a_control():
    for key in METHODS:
        assert style.color_of(key) == style.color_of(label(key)), key
        assert style.color_of(key) == style.color_of(key.partition(":")[2] or key), key
    unknown = {key for key in METHODS if style.method_of(key) == "other"}
    assert unknown == {"task-frozen", "task-trained"}, "not of a method: controls without a null space"


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("before", "aligned"),
        ("unaligned", "other"),
        ("lora, 10 % poison", "lora"),
        ("GuardSpace", "guardspace"),
        ("SALORA", "salora"),
        ("repaired: projection topk", "safe_lora"),
        ("OrthoSafetyPatch", "patch"),
        ("SOMF", "somf"),
        ("screen + plain LoRA", "data"),
        ("LoRA-FA", "other"),
        ("DoRA", "other"),
    ],
)
def test_names_of_arms_are_recognized(name, method):
    assert style.method_of(name) == method


def test_the_smallest_text_is_legible_where_a_page_shows_a_picture_at_600_pixels_or_a_narrow_one_at_400():
    sizes = [value for key, value in style.RC.items() if key.endswith("size")]
    assert len(sizes) > 3
    assert min(sizes) * 600 / (72 * style.WIDTH) >= 11
    assert min(sizes) * 400 / (72 * style.NARROW) >= 11


def test_controls_are_hollow(tmp_path):
    with style.picture(tmp_path / "one.png", 1.0) as (_, (panel,)):
        for hollow in (False, True):
            style.point(panel, 1, 1, "#0072B2", hollow=hollow)
        assert [line.get_markerfacecolor() for line in panel.lines] == ["#0072B2", style.PANEL]


def test_controls_are_told_by_their_names():
    assert all(map(style.is_control, ["random:frozen", "hard, random basis", "random mask (control)", "scaled:somf"]))
    assert not any(map(style.is_control, ["GuardSpace", "aligned, before", "plain LoRA"]))


@pytest.mark.parametrize("color", [style.INK, style.MUTED, *(color for color, _ in style.METHODS.values())])
def test_text_is_legible_on_the_panel(color):
    light, dark = (style.luminance(c) + 0.05 for c in (style.PANEL, style.ink(color)))
    assert light / dark >= 4.5
    assert style.luminance(style.ink(color)) <= style.luminance(color)


@pytest.mark.parametrize("wanted", [[], [50.0], [1.0] * 12, [99.0] * 12, [1.0, 2.0, 12.0, 88.0, 90.0], [50.0] * 40])
def test_labels_keep_their_distance_and_their_order(wanted):
    gaps = [6.0] * (len(wanted) - 1)
    placed = style.spread(wanted, gaps, 0.0, 100.0)
    least = min(6.0, 100.0 / max(1, len(gaps)))
    assert len(placed) == len(wanted)
    assert all(b - a >= least - 1e-9 for a, b in itertools.pairwise(placed))
    assert all(-1e-9 <= value <= 100 + 1e-9 for value in placed)


def test_labels_stay_where_there_is_room_and_share_the_way_where_there_is_none():
    assert style.spread([10.0, 40.0, 80.0], [6.0, 6.0], 0.0, 100.0) == [10.0, 40.0, 80.0]
    assert style.spread([50.0, 50.0], [6.0], 0.0, 100.0) == [47.0, 53.0]


def test_a_cell_that_was_not_run_is_hatched_and_a_zero_is_not(tmp_path):
    path = tmp_path / "one.png"
    with style.picture(path, 2.0) as (canvas, (panel,)):
        style.heat(panel, [[0.0, float("nan"), 0.0]], ".0f", 0, 100, "#FFFFFF", style.color_of("lora"))
        canvas.draw_without_rendering()
        height = style.PIXELS / style.WIDTH * 2.0
        shares = []
        centers = [panel.transData.transform((x, -0.3)) for x in range(3)]  # beside the figure in the middle
    with Image.open(path) as image:
        for x, y in (center * style.PIXELS / canvas.bbox.width for center in centers):
            part = np.asarray(
                image.convert("L").crop((int(x) - 40, int(height - y) - 40, int(x) + 40, int(height - y) + 40))
            )
            shares.append((part < 225).mean())
    assert shares[0] == shares[2] == 0
    assert 0.05 < shares[1] < 0.5


def test_a_picture_is_an_opaque_panel_of_one_width(tmp_path):
    path = tmp_path / "new" / "one.png"
    with style.picture(path, 1.0, title="$x^$", note="a\nb") as (_, (panel,)):
        style.point(panel, 1, 1, "#0072B2")
    with Image.open(path) as image:
        assert image.width == 1200
        assert "transparency" not in image.info, "nothing of the page shows through"
        assert image.convert("RGBA").getpixel((12, 12)) == (*(int(style.PANEL[i : i + 2], 16) for i in (1, 3, 5)), 255)


def test_a_picture_is_a_png_in_a_place_that_can_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    for name in ("one", "one.jpg", "one.pdf", "one.foo"):
        with pytest.raises(ConfigError, match=r"ends in \.png"), style.picture(tmp_path / name, 1.0):
            raise AssertionError("drawn")
    for name in ("file/one.png", "folder.png"):
        with pytest.raises(ArtifactError, match="cannot be written"), style.picture(tmp_path / name, 1.0):
            raise AssertionError("drawn")
    with style.picture(tmp_path / "new" / "ONE.PNG", 1.0):
        pass
    assert (tmp_path / "new" / "ONE.PNG").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingPackageError, match=r"peft-safety\[plot\]"):
        style.check_png(tmp_path / "one.png")
