"""What `peft-safety verify` prints, and what is in its JSON."""

import json
import re

import pytest
from typer.testing import CliRunner

from peft_safety.cli import app
from peft_safety.reporting.verification import applying
from tests.peft.frozen_cells import frozen, windowed
from tests.peft.guard_cells import guarded

IDLE = ["combine rank", "combine_rank", "preconditioner", "unconstrained"]


def shown(folder, *options):
    done = CliRunner().invoke(app, ["verify", str(folder), *options])
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.parametrize(("make", "idle"), [(frozen, [*IDLE, "window"]), (windowed, IDLE), (guarded, IDLE)])
def test_only_what_applies_is_printed_and_all_is_in_the_json(make, idle, tmp_path, monkeypatch):
    make().save_pretrained(tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    text = shown("adapter")
    assert not [word for word in idle if word in text]
    assert max(map(len, text.splitlines())) <= 80
    assert not re.search("[0-9a-f]{13}", text), "hashes as short as in errors, on one line"
    found = json.loads(shown("adapter", "--json"))
    assert found["unconstrained"] == []
    if make is frozen:
        assert {"combine_rank", "preconditioner", "window"} <= found["settings"].keys()
        assert len(found["subspace"]) == 64
        assert f"subspace           {found['subspace'][:12]}" in text
        assert "a_init: task" in text


def test_a_setting_applies_where_another_has_its_value():
    every = {
        "train": "B",
        "window": 64,
        "a_init": "task",
        "init": "lora",
        "preconditioner": "root",
        "combine_rank": 32,
    }
    assert applying(every).keys() == {"train", "a_init", "init"}
    assert applying(every | {"train": "window"}).keys() == {"train", "window", "a_init", "init"}
    assert applying(every | {"train": "A", "init": "guardspace"}).keys() == {"train", "init", "preconditioner"}
    assert applying(every | {"combine": "salora"}).keys() == {"train", "a_init", "init", "combine", "combine_rank"}
    assert applying({"made_by": "repair"}) == {"made_by": "repair"}
