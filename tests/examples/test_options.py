"""Options of the examples: arms are checked before a model is loaded, figures have the name of their data."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from examples import fuse, patch
from peft_safety.evaluation import Rate


@pytest.mark.parametrize("arms", ["none,hard", "none;sfot", ""])
def test_an_unknown_arm_is_refused_before_a_model_is_loaded(arms, monkeypatch, capsys):
    monkeypatch.setattr(patch, "Comparison", None)
    monkeypatch.setattr("sys.argv", ["patch", "--model", "m", "--arms", arms])
    with pytest.raises(SystemExit):
        patch.main()
    assert "separated by semicolons" in capsys.readouterr().err


def test_arms_are_separated_by_semicolons(monkeypatch):
    made = []

    class Comparison:
        def __init__(self, *_):
            self.options, self.model, self.details = patch.PatchOptions(), None, {}
            self.arms = {"unpatched": {"refusal": Rate(1, 2)}}

        arm = staticmethod(made.append)

    monkeypatch.setattr(patch, "Comparison", Comparison)
    monkeypatch.setattr(patch, "finish", lambda *_: None)
    monkeypatch.setattr("sys.argv", ["patch", "--model", "m", "--arms", f"none; {patch.CONTROL}"])
    patch.main()
    assert made == ["none", "hard, random basis"]


@pytest.mark.parametrize(("data", "name"), [(None, "help desk"), (Path("data") / "banking.jsonl", "banking.jsonl")])
def test_figures_of_other_data_have_its_name(data, name, monkeypatch):
    job = fuse.Fusing(fuse.SMOKE, SimpleNamespace(data=data, seed=0))
    job.model, job.tokenizer = SimpleNamespace(set_adapter=lambda _: None), None
    job.bench = SimpleNamespace(measure=lambda *_: SimpleNamespace(figures=lambda: {"task accuracy": 0.5}))
    job.tasks = [None, SimpleNamespace(held_out=[], labels=[])]
    monkeypatch.setattr(fuse, "exact_answers", lambda *_: [True])
    job.measure("safe adapter", "default")
    assert set(job.arms["safe adapter"]) == {f"accuracy, {name}", "accuracy, headlines"}
