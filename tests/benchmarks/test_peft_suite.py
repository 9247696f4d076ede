"""The runner of PEFT's own tests: what it puts in place of `LoraConfig`, which tests it runs, and how it counts."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from benchmarks.peft_suite import arms, kinds, models, report, run
from benchmarks.peft_suite.plugin import Known, finished, short
from benchmarks.peft_suite.sources import PACKAGE, STAND_IN, copy_tests, substituted

SOURCE = """import os
from peft import (
    LoraConfig,
    get_peft_model,
)
from peft.tuners.lora import LoraConfig as Own


def test_ä():
    é = 1; from peft import LoraConfig  # inside
    assert LoraConfig is Own
"""


def test_the_stand_in_follows_each_import_and_moves_no_line():
    changed = substituted(SOURCE)
    assert len(changed.splitlines()) == len(SOURCE.splitlines())
    assert changed.count(STAND_IN) == 3
    assert f"); {STAND_IN}\n" in changed
    assert f"LoraConfig as Own; {STAND_IN} as Own\n" in changed
    assert f"from peft import LoraConfig; {STAND_IN}  # inside\n" in changed
    untouched = "from peft import IA3Config\nfrom .own import LoraConfig\nfrom peftlike import LoraConfig\n"
    assert substituted(untouched) == untouched


def test_random_bases_are_orthonormal_and_leave_single_features_out():
    layers = {"one": torch.nn.Linear(1, 8), "many": torch.nn.Linear(16, 8)}
    space = arms.random_subspace(layers, "in")
    basis = space.bases["many"]["in"]
    assert basis.shape == (16, 16 // arms.SHARE)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(4))
    assert set(space.left_out) == {"one"}
    assert set(arms.random_subspace(layers, "out").bases) == {"one", "many"}


@pytest.mark.parametrize("kind", ["opt", "gpt2", "t5", "deberta2"])
def test_models_are_the_same_each_time(kind):
    one, other = models.model_of(kind).state_dict(), models.model_of(kind).state_dict()
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert set(models.NAMES.values()) <= set(models.KINDS)


def test_names_do_not_depend_on_the_arm(monkeypatch):
    class GuardSpaceConfig:
        pass

    assert short("some/test_x.py::T::test_y[LoraConfig-a]") == "test_x.py::T::test_y[LoraConfig-a]"
    monkeypatch.setattr(arms, "LoraConfig", GuardSpaceConfig)
    assert short("test_x.py::T::test_y[GuardSpaceConfig-a]") == "test_x.py::T::test_y[LoraConfig-a]"
    assert short("test_x.py::T::test_y_0_GuardSpace_LoHa") == "test_x.py::T::test_y_0_Lora_LoHa"
    assert "any/model" in Known()
    Known()["any/model"] += 1


def refused(says, error="ConfigError"):
    return {"test": "t", "outcome": "failed", "raised": [{"error": error, "says": says}], "chain": []}


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"test": "t", "outcome": "passed"}, ("passed", "")),
        (refused("x: use_dora is not supported: because"), ("refused", "DoRA")),
        (refused("emb: Embedding(10, 3)\nunder Embedding cannot be protected"), ("refused", "embeddings")),
        (refused("something new"), ("refused", "ConfigError: something new")),
        ({"test": "t", "outcome": "crashed"}, ("undeclared", "crashed: ")),
        (
            {"test": "t", "outcome": "failed", "raised": [], "chain": [{"error": "KeyError", "says": "k"}]},
            ("undeclared", "KeyError: k"),
        ),
        ({"test": "test_adapter_dtype_x", "outcome": "failed", "chain": []}, ("undeclared", "failed: ")),
    ],
)
def test_what_became_of_a_test(row, kind):
    assert report.kind_of(row) == kind


def test_differences_by_design_are_those_of_an_arm():
    row = {"test": "test_adapter_dtype_x", "outcome": "failed", "chain": []}
    assert report.kind_of(row, "frozen")[0] == "by design"


def test_the_table_fits_a_terminal():
    long = {("undeclared", "X" * 200): 3, ("passed", ""): 4}
    lines = report.table("frozen", Counter(long))
    assert lines[0] == "frozen: of 7 tests that plain LoRA passes, 4 passed, 3 undeclared"
    assert max(map(len, lines)) <= report.WIDTH


def test_what_has_no_name_is_counted_together():
    counts = Counter(
        {("refused", "DoRA"): 2, ("refused", "ArtifactError: a"): 3, ("refused", "b"): 1, ("passed", ""): 9}
    )
    assert list(report.summed(counts).items()) == [
        (("passed", ""), 9),
        (("refused", report.OTHERS), 4),
        (("refused", "DoRA"), 2),
    ]


TESTS = """import pytest, torch
from peft import IA3Config, LoraConfig, PeftConfig, get_peft_model


@pytest.mark.parametrize("cls", [LoraConfig, IA3Config])
def test_trains(cls):
    feedforward = {"feedforward_modules": []} if cls is IA3Config else {}
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), cls(target_modules=["0"], **feedforward))
    model(torch.ones(1, 8)).sum().backward()


def test_bias():
    LoraConfig(bias="all")


def test_of_no_adapter():
    assert True


def test_that_fails():
    LoraConfig()
    assert False
"""


@pytest.mark.slow
def test_an_arm_runs_what_plain_lora_passes_and_continues(tmp_path):
    own = tmp_path / "tests"
    own.mkdir()
    (own / "test_small.py").write_text(TESTS)
    runs = tmp_path / "runs"
    runs.mkdir()
    tests = copy_tests(own, runs)
    assert tests == runs / PACKAGE
    for arm in ("plain", "frozen"):
        assert run.run(tests, runs, arm, ["test_small"]) == []
    assert sorted(run.passing(runs, "test_small")) == [
        "test_small.py::test_bias",
        "test_small.py::test_trains[LoraConfig]",
    ]
    counts = report.counted(runs, "frozen", ["test_small"])
    assert counts == {("passed", ""): 1, ("refused", "bias"): 1}
    log = run.results_file(runs, "frozen", "test_small")
    before = log.read_text()
    assert len(finished(log)) == 2
    assert run.run(tests, runs, "frozen", ["test_small"]) == []
    assert log.read_text() == before


def test_the_command_says_what_it_does():
    command = [sys.executable, "-m", "benchmarks.peft_suite", "--help"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=True)
    assert "pip download" in done.stdout


def test_each_kind_has_a_reason():
    names = [kind.name for kind in (*kinds.KINDS, *kinds.DIFFERENCES)]
    assert len(set(names)) == len(names) == len(kinds.REASONS)
    assert all(reason.endswith(".") and "|" not in reason for reason in kinds.REASONS.values())


@pytest.mark.parametrize(
    ("says", "kind"),
    [
        ("lin0: the product of lora_A (8, 10) and lora_B (20, 8) may reach 8.5e+38.", "a factor that was overwritten"),
        ("lin1 has lora_A missing and lora_B (5, 8).", "files that are incomplete"),
        ("x is not a GuardSpaceConfig: is missing required keys", "a config of another kind"),
    ],
)
def test_a_typed_error_is_named_by_what_it_says(says, kind):
    row = {"outcome": "failed", "test": "test_a", "chain": [{"error": "ArtifactError", "says": says}]}
    assert report.kind_of(row) == ("refused", kind)
