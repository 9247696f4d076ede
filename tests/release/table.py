"""Writes the table of docs/install.md from what `make wheel-check` has measured: `python -m tests.release.table`."""

from __future__ import annotations

import json
from pathlib import Path

from tests.release.fresh import MEASURED, ROOT, Install

PAGE = ROOT / "docs" / "install.md"
BEGIN, END = "<!-- installs:begin -->\n", "<!-- installs:end -->"


def read(path: Path = MEASURED) -> list[Install]:
    """The measured installs, in the order in which they were made."""
    return [Install(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def table(installs: list[Install]) -> str:
    """A row for each call of pip: what there is then, and how much of it PEFT and transformers alone do not need."""
    lines = [
        "| releases | installed | packages | MB | beside PEFT and transformers | seconds of pip |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    alone = {one.releases: one for one in installs if one.what == "peft, transformers"}
    for one in installs:
        base = alone[one.releases]
        more, larger = one.packages - base.packages, one.megabytes - base.megabytes
        beside = "" if more < 0 else f"+{more}, {larger:.1f} MB" if more else "-"
        row = (one.releases, one.what, str(one.packages), f"{one.megabytes:.0f}", beside, f"{one.seconds:.0f}")
        lines.append(f"| {' | '.join(row)} |")
    here = installs[0]
    versions = "; ".join(
        f"{releases}: " + ", ".join(f"{name} {one.versions[name]}" for name in ("torch", "peft", "transformers"))
        for releases, one in {one.releases: one for one in installs}.items()
    )
    where = f"Measured on {here.date} with Python {here.python} on {here.platform} ({versions})."
    return "\n".join(lines) + f"\n\n{where}\n"


def write(installs: list[Install], page: Path = PAGE) -> None:
    """Put the table between its two marks."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    assert end, f"{page.name} has no marks for the table"
    page.write_text(before + BEGIN + table(installs) + END + after, encoding="utf-8")


if __name__ == "__main__":
    write(read())
