"""frontier.html: one file that loads nothing from outside. The summary is at the top, all tables are below."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.frontier import tables
from benchmarks.frontier.aggregate import Points, label, names, pairs, shares
from benchmarks.frontier.cells import Cell
from benchmarks.frontier.results import caveats
from peft_safety.evaluation import KeywordJudge

STYLE = """
body{font:15px/1.45 system-ui,sans-serif;max-width:1180px;margin:2em auto;padding:0 1em;color:#222}
h1{font-size:1.5em}h2{font-size:1.15em;margin-top:2em}img{width:100%;max-width:720px}
table{border-collapse:collapse;font-size:12.5px;margin:.6em 0;display:block;overflow-x:auto}
th,td{padding:.22em .55em;text-align:right;border-bottom:1px solid #e5e5e5;white-space:nowrap}
th{white-space:normal;vertical-align:bottom;font-weight:600}th:first-child,td:first-child{text-align:left}
tbody tr:nth-child(even){background:#fafafa}.note{font-size:12.5px;color:#666;max-width:60em}
details{margin:.6em 0}summary{cursor:pointer;font-weight:600}
"""


def summary(points: Points, poison: float) -> list[str]:
    """The figures as sentences."""
    lines = []
    plain, before = points.get(("lora", poison)), points.get(("aligned", poison))
    if plain is None or plain.rate("refusal") is None:
        return ["Plain LoRA has not been measured yet: nothing can be compared."]
    rate, accuracy = plain.rate("refusal"), plain.rate("task_accuracy")
    start = f"from {before.rate('refusal')} " if before is not None and before.rate("refusal") is not None else ""
    lines.append(
        f"With {100 * poison:g} % of the rows poisoned, plain LoRA takes refusal {start}to {rate}, at {accuracy} "
        "accuracy on its task."
    )
    for name in names(points, controls=False):
        point = points.get((name, poison))
        if name in ("aligned", "lora") or point is None or not point.rows:
            continue
        versus = pairs(point, plain)
        said = (
            f"{label(name)}: refusal {point.rate('refusal')}, accuracy {point.rate('task_accuracy')}; "
            f"against plain LoRA {tables.difference(versus)} points"
        )
        for kind, words in (("random", "against its random control"), ("scaled", "against plain LoRA of equal norm")):
            control = points.get((f"{kind}:{name}", poison))
            if control is not None and (compared := pairs(point, control)) is not None:
                said += f"; {words} {tables.difference(compared)}"
        lines.append(said + ".")
    return lines


def html_page(
    points: Points,
    environment: Mapping[str, Any],
    pictures: Sequence[Path],
    split: str,
    poison: float,
    missing: dict[str, int],
    planned: Sequence[Cell],
) -> str:
    """The whole page."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>The safety-utility "
        f"frontier</title><style>{STYLE}</style>"
    ]
    parts.append("<h1>The safety-utility frontier of LoRA fine-tuning</h1>")
    parts.append(
        f"<p>{html.escape(environment.get('model', 'unknown model'))}, {html.escape(split)} prompts. Judge: keyword. "
        f"{html.escape(KeywordJudge.caveat)} {tables.BRACKETS}</p>"
    )
    parts += [f"<p><b>{html.escape(caveat)}</b></p>" for caveat in caveats(environment)]
    if split != "test":
        parts.append("<p><b>Validation prompts only: nothing here is a result.</b></p>")
    parts += [_picture(path) for path in pictures[:1]]
    parts.append(
        f"<h2>In sentences, at {tables.share(poison)}</h2><ul>"
        + "".join(f"<li>{html.escape(line)}</li>" for line in summary(points, poison))
        + "</ul>"
    )
    parts += [_picture(path) for path in pictures[1:]]
    for share in shares(points):
        opened = " open" if share == poison else ""
        parts.append(f"<h2>{tables.share(share)}</h2>")
        parts.append(_folded("All figures", tables.everything(points, share).html(), opened))
        parts.append(_folded("Paired comparisons", tables.paired(points, share).html(), opened))
        for title, table in (
            ("Other prompt sets", tables.transfer(points, share)),
            ("By judge", tables.verdicts_of_judges(points, share)),
        ):
            if table is not None:
                parts.append(_folded(title, table.html()))
    parts.append(
        "<h2>What is missing</h2>"
        + (tables.absent(missing, planned).html() if missing else "<p>Nothing of the plan.</p>")
    )
    facts = "".join(
        f"<tr><td>{html.escape(str(key))}</td><td>{html.escape(str(value))}</td></tr>"
        for key, value in environment.items()
    )
    parts.append(f"<h2>Environment</h2><table>{facts}</table>")
    return "\n".join(parts) + "\n"


def _picture(path: Path) -> str:
    return f'<img alt="{path.stem}" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'


def _folded(title: str, content: str, opened: str = "") -> str:
    return f"<details{opened}><summary>{html.escape(title)}</summary>{content}</details>"
