"""Draws which room of the package imports which, docs/pictures/rooms.svg: `python docs/_site/rooms.py`.

The order of the rooms is that of the import contract in pyproject.toml, the dots are the imports themselves.
"""

from __future__ import annotations

from pathlib import Path

import grimp
import tomllib

ROOT = Path(__file__).resolve().parents[2]
DRAWING = ROOT / "docs" / "pictures" / "rooms.svg"
PACKAGE = "peft_safety"
CONTRACT = "rooms import downwards only"

CELL, LEFT, TOP, MARGIN = 26, 118, 104, 14
RADIUS = 6
STYLE = """
    text { font: 14px system-ui, sans-serif; fill: #20242c }
    .ground { fill: #ffffff } .floor { fill: #eef0f6 } .self { fill: #c3c8d6 } .dot { fill: #3f51b5 }
    @media (prefers-color-scheme: dark) {
      text { fill: #e2e4ea } .ground { fill: #1e2129 } .floor { fill: #2a2e39 } .self { fill: #4a5060 }
      .dot { fill: #9fa8ff }
    }
"""


def floors() -> list[list[str]]:
    """The rooms of each floor, the highest floor first."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = settings["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract["name"] == CONTRACT)
    return [[room.strip(" ()") for room in layer.split(":")] for layer in layers]


def imports(rooms: list[str]) -> set[tuple[str, str]]:
    """The pairs of which the first room imports the second; imports inside functions count too."""
    graph = grimp.build_graph(PACKAGE, cache_dir=None)
    pairs = set()
    for module in graph.modules:
        for target in graph.find_modules_directly_imported_by(module):
            source, imported = ([*name.split("."), ""][1] for name in (module, target))
            if source != imported and {source, imported} <= set(rooms):
                pairs.add((source, imported))
    return pairs


def draw(levels: list[list[str]], pairs: set[tuple[str, str]]) -> str:
    """An SVG picture that follows the reader's choice of a light or dark ground."""
    rooms = [room for level in levels for room in level]
    side = CELL * len(rooms)
    width, height = LEFT + side + MARGIN, TOP + side + MARGIN
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">',
        f"  <title>Which room of {PACKAGE} imports which</title>",
        f"  <style>{STYLE}  </style>",
        f'  <rect class="ground" width="{width}" height="{height}" rx="6"/>',
    ]
    start = 0
    for number, level in enumerate(levels):
        if number % 2 == 0:
            y, tall = TOP + start * CELL, len(level) * CELL
            lines.append(f'  <rect class="floor" x="{MARGIN / 2}" y="{y}" width="{width - MARGIN}" height="{tall}"/>')
        start += len(level)
    for place, room in enumerate(rooms):
        x, y = LEFT + (place + 0.5) * CELL, TOP + (place + 0.5) * CELL
        lines += [
            f'  <text x="{LEFT - 10}" y="{y + 5}" text-anchor="end">{room}</text>',
            f'  <text transform="translate({x + 5} {TOP - 8}) rotate(-60)">{room}</text>',
            f'  <rect class="self" x="{x - 5}" y="{y - 5}" width="10" height="10"/>',
        ]
    for source, imported in sorted(pairs):
        x, y = (base + (rooms.index(room) + 0.5) * CELL for base, room in ((LEFT, imported), (TOP, source)))
        title = f"<title>{source} imports {imported}</title>"
        lines.append(f'  <circle class="dot" cx="{x}" cy="{y}" r="{RADIUS}">{title}</circle>')
    return "\n".join([*lines, "</svg>", ""])


def drawing() -> str:
    levels = floors()
    pairs = imports([room for level in levels for room in level])
    # of two rooms of one floor, the one that imports the other stands above it
    levels = [sorted(level, key=lambda room: -sum((room, other) in pairs for other in level)) for level in levels]
    return draw(levels, pairs)


if __name__ == "__main__":
    DRAWING.write_text(drawing(), encoding="utf-8")
