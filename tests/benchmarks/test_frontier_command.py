"""The command itself: a tiny grid end to end, killed and resumed; and the smoke run's verdict."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.frontier import __main__ as command
from benchmarks.frontier import plan, smoke
from benchmarks.frontier.cache import Cache
from benchmarks.frontier.results import NAME, read
from peft_safety.errors import DataError
from tests.tiny import tiny_llama, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
METHODS = ("aligned", "lora", "safe-lora-topk", "scaled:safe-lora-topk")
FIGURES = ("verdicts", "correct", "refusal", "task_accuracy", "norm", "transfer")


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    """A tiny unaligned and aligned model, and the options of a grid of seven cells on them. No shared data is in
    reach.
    """
    monkeypatch.chdir(tmp_path)
    for name, seed in (("aligned", 0), ("bare", 1)):
        tiny_llama(seed, hidden=64).save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    sizes = [
        "--rows",
        "8",
        "--limit",
        "2",
        "--second",
        "2",
        "--p",
        "0.5,1",
        "--seeds",
        "0",
    ]  # clean rows are too long for bytes as tokens
    return ["--model", str(tmp_path / "bare"), "--aligned", str(tmp_path / "aligned"), "--methods", *METHODS, *sizes]


def table(folder):
    """Cells and figures without what time decides."""
    return [{"cell": row["cell"], **{name: row.get(name) for name in FIGURES}} for row in read(folder / NAME)[1]]


def test_a_tiny_grid_end_to_end(arguments, tmp_path, capsys):
    places = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    assert command.main([*arguments, *places, "--budget", "0"]) == 0
    assert "0 cells run" in capsys.readouterr().out
    assert command.main([*arguments, *places]) == 0
    assert "7 cells run (0 diverged), 7 of 7 done" in capsys.readouterr().out
    first = table(tmp_path / "out")
    assert command.main([*arguments, *places, "--list"]) == 0
    assert capsys.readouterr().out.count("done") == 7
    assert command.main([*arguments, *places]) == 0
    assert "0 cells run" in capsys.readouterr().out
    assert table(tmp_path / "out") == first
    environment, rows = read(tmp_path / "out" / NAME)
    assert environment["model"] == "aligned" or "patched" in environment["model"]
    assert environment["torch"] == torch.__version__.split("+")[0] or environment["torch"] == torch.__version__
    assert {tuple(row["transfer"]) for row in rows} == {("reworded", "other_languages")}, (
        "nothing but the package's own prompts"
    )
    assert command.main(["--report", "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "frontier.html").is_file()
    elsewhere = ["--runs", str(tmp_path / "elsewhere"), "--adopt", str(tmp_path / "out" / NAME)]
    assert command.main([*arguments, *elsewhere, "--list"]) == 0
    assert capsys.readouterr().out.count("done") == 7
    assert command.main([*arguments, *elsewhere, "--limit", "3"]) == 1
    assert "has limit 2, this call 3" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_killed_and_started_again_gives_the_same_table(arguments, tmp_path):
    def start(name):
        places = ["--runs", str(tmp_path / name), "--out", str(tmp_path / name / "out")]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [sys.executable, "-m", "benchmarks.frontier", *arguments, *places],
            env=environment,
            stderr=subprocess.DEVNULL,
        )

    assert start("whole").wait(240) == 0
    worker = start("broken")
    while len(list((tmp_path / "broken").glob("*.json"))) < 2:
        time.sleep(0.01)
        assert worker.poll() is None
    worker.send_signal(signal.SIGKILL)
    worker.wait(10)
    assert not (tmp_path / "broken" / "out").exists(), "it was killed in the middle"
    assert start("broken").wait(240) == 0
    assert table(tmp_path / "broken" / "out") == table(tmp_path / "whole" / "out")


def figures(refusal, accuracy):
    """A made-up cell."""
    rates = {"refusal": refusal, "task_accuracy": accuracy, "compliance": 0.0, "over_refusal": 0.0}
    return {
        name: {"value": value, "k": round(40 * value), "n": 40, "low": 0.0, "high": 1.0}
        for name, value in rates.items()
    }


GOOD = {
    "aligned": (0.95, 0.0),
    "lora": (0.05, 0.5),
    "safe-lora-soft": (0.95, 0.2),
    "guardspace": (0.9, 0.48),
    "random:guardspace": (0.05, 0.5),
}


@pytest.mark.parametrize(
    ("change", "holds"),
    [
        ({}, [True, True, True]),
        ({"lora": (0.25, 0.5)}, [False, True, True]),
        ({"guardspace": (0.84, 0.5)}, [True, False, True]),
        ({"guardspace": (0.95, 0.46)}, [True, False, True]),
        ({"guardspace": (0.95, 0.46), "safe-lora-soft": (0.9, 0.5)}, [True, True, True]),
        ({"random:guardspace": (0.9, 0.5)}, [True, True, False]),
    ],
    ids=str,
)
def test_what_the_smoke_run_says(change, holds):
    rows = {name: figures(*values) for name, values in {**GOOD, **change}.items()}
    assert [hold for hold, _ in smoke.verdict(rows)] == holds


def test_the_smoke_run_needs_all_of_its_cells():
    rows = {name: figures(*values) for name, values in GOOD.items()}
    with pytest.raises(DataError, match="no figures for lora"):
        smoke.verdict({**rows, "lora": {"diverged": "the loss is not finite"}})


@pytest.mark.parametrize(("refusal", "status"), [(0.05, 0), (0.5, 1)])
def test_the_smoke_run_exits_as_it_finds(refusal, status, tmp_path, capsys):
    cache = Cache(tmp_path, smoke.PROTOCOL)
    for cell in smoke.cells():
        name = plan.name_of(cell).split(" with ")[0]
        result = figures(*({**GOOD, "lora": (refusal, 0.5)}[name]))
        marks = {"verdicts": {"keyword": {"harmful": "R" * 40, "contrast": "O"}}, "correct": {"task": "1" * 40}}
        cache.put(
            cell,
            {**result, **marks, "judge": "keyword", "general_nll": {"value": 0.7}, "transfer": {}, "seconds": 1.0},
        )
    assert command.main(["--smoke", "--runs", str(tmp_path)]) == status
    said = capsys.readouterr().out
    assert ("DOES NOT HOLD" in said) == bool(status)
    assert (tmp_path / "frontier.html").is_file()


def test_the_smoke_run_stays_off_test_prompts():
    assert {cell.split for cell in smoke.cells()} == {"validation"}
    assert {cell.poison for cell in smoke.cells() if cell.arm != "aligned"} == {0.1}
    assert len(smoke.cells()) == len(plan.SMOKE)
