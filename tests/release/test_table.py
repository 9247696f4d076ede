"""The table of docs/install.md, from made-up installs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tests.release.fresh import Install
from tests.release.table import BEGIN, END, PAGE, table, write

VERSIONS = {"torch": "3.0", "peft": "0.9", "transformers": "6.1"}
ALONE = Install("newest", "peft, transformers", 30.4, 40, 900.0, VERSIONS, "3.12", "Linux x86_64", "2026-01-02")
OWN = replace(ALONE, what="peft-safety", seconds=4.0, packages=41, megabytes=901.74)
OLD = replace(ALONE, releases="oldest", versions={**VERSIONS, "peft": "0.8"}, packages=30, megabytes=800.0)


def test_what_is_installed_beside_peft_is_the_difference_to_the_same_releases() -> None:
    lines = table([ALONE, OWN, OLD, replace(OLD, what="peft-safety", packages=31, megabytes=802.0)]).splitlines()
    assert lines[2] == "| newest | peft, transformers | 40 | 900 | - | 30 |"
    assert lines[3] == "| newest | peft-safety | 41 | 902 | +1, 1.7 MB | 4 |"
    assert lines[5] == "| oldest | peft-safety | 31 | 802 | +1, 2.0 MB | 30 |"
    assert lines[-1] == (
        "Measured on 2026-01-02 with Python 3.12 on Linux x86_64 (newest: torch 3.0, peft 0.9, transformers 6.1; "
        "oldest: torch 3.0, peft 0.8, transformers 6.1)."
    )


def test_the_rest_of_the_page_stays(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}old\n{END}\nafter\n", encoding="utf-8")
    for _ in range(2):
        write([ALONE], page)
        assert page.read_text(encoding="utf-8") == f"before\n{BEGIN}{table([ALONE])}{END}\nafter\n"


def test_the_page_has_the_measured_table() -> None:
    text = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    for what in ("torch", "peft, transformers", "peft-safety", "peft-safety[cli]", "peft-safety[trl]"):
        for releases in ("newest", "oldest"):
            assert f"| {releases} | {what} |" in text
