"""The engine: cells survive kills, full disks and failures; processes share a grid; names stay."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.frontier import cache as cache_module
from benchmarks.frontier.cache import Cache
from benchmarks.frontier.cells import Cell, Protocol, needs
from benchmarks.frontier.plan import METHODS
from benchmarks.frontier.results import NAME, read
from benchmarks.frontier.run import run
from peft_safety.errors import ArtifactError, ConfigError, DataError, DivergedError
from tests.benchmarks.worker import CELLS, made_up

ROOT = Path(__file__).resolve().parents[2]
LORA, GUARD = METHODS["lora"], METHODS["guardspace"]


def start(folder: Path, seconds: float) -> subprocess.Popen:
    """A worker in a process of its own."""
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tests/benchmarks/worker.py"), str(folder), str(seconds)],
        env=environment,
        stderr=subprocess.DEVNULL,
    )


def table(folder: Path) -> list:
    """The results without what time decides."""
    return [
        {name: value for name, value in row.items() if name != "seconds"} for row in read(folder / "out" / NAME)[1]
    ]


def begun(folder: Path) -> list[str]:
    """Keys of the cells that were begun."""
    log = folder / "log"
    return [line.split()[1] for line in log.read_text().splitlines()] if log.exists() else []


def test_a_killed_run_resumes_with_the_same_table(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert start(whole, 0.0).wait(60) == 0
    worker = start(broken, 0.4)
    while len(begun(broken)) < 3:
        time.sleep(0.02)
        assert worker.poll() is None
    worker.send_signal(signal.SIGKILL)
    worker.wait(10)
    finished = {path.stem for path in broken.glob("*.json")}
    assert len(finished) >= 2
    assert start(broken, 0.0).wait(60) == 0
    assert table(broken) == table(whole)
    assert len(table(whole)) == len(set(CELLS))
    again = begun(broken)
    assert all(again.count(key) == 1 for key in finished), "finished cells are not run again"
    assert [key for key in again if again.count(key) == 2] == again[2:3] * 2, "only the cell that was under way is"
    assert not list(broken.glob("*.lock")), "the dead process's lock is no obstacle, and is cleared away"


def test_two_processes_share_a_grid(tmp_path):
    workers = [start(tmp_path, 0.15) for _ in range(2)]
    assert [worker.wait(60) for worker in workers] == [0, 0]
    keys = begun(tmp_path)
    assert sorted(keys) == sorted(set(keys)), "no cell twice"
    assert len(keys) == len(set(CELLS))
    owners = {line.split()[0] for line in (tmp_path / "log").read_text().splitlines()}
    assert len(owners) == 2


def test_a_lock_names_its_holder_and_is_freed(tmp_path):
    cache = Cache(tmp_path, Protocol())
    with cache.lock("x") as mine:
        assert mine
        assert json.loads((tmp_path / "x.lock").read_text())["pid"] == os.getpid()
        with cache.lock("x") as again:
            assert not again
    with cache.lock("x") as mine:
        assert mine
    assert not (tmp_path / "x.lock").exists()


def test_a_full_disk_keeps_what_is_finished(tmp_path, monkeypatch):
    cache, written = Cache(tmp_path, Protocol()), []
    real = os.replace

    def full(source, target):
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        written.append(target)
        real(source, target)

    monkeypatch.setattr(cache_module.os, "replace", full)
    with pytest.raises(ArtifactError, match=r"No space left on device.*run the same command again"):
        run(cache, lambda: CELLS, made_up, needs=needs)
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in written)
    assert run(cache, lambda: CELLS, made_up, needs=needs).done == len(CELLS) - 2


def test_a_diverged_cell_is_recorded_and_a_failed_one_is_not(tmp_path):
    cache = Cache(tmp_path, Protocol())
    cells = [LORA, replace(LORA, lr=9.0), GUARD, replace(GUARD, control="scaled")]

    def work(cell):
        if cell.lr > 1:
            raise DivergedError("the loss is not finite. Lower the learning rate.")
        if cell == GUARD:
            raise ConfigError("no such thing")
        return made_up(cell)

    outcome = run(cache, lambda: cells, work, needs=needs)
    assert (outcome.done, outcome.diverged) == (2, 1)
    assert "Lower the learning rate" in cache.get(cells[1])["diverged"]
    assert cache.get(GUARD) is None
    assert "no such thing" in outcome.failed[GUARD]
    assert "needs the cell" in outcome.failed[cells[3]]
    assert run(cache, lambda: cells, made_up, needs=needs).done == 2, (
        "what failed is tried again, what diverged is not"
    )


def test_a_budget_stops_between_cells(tmp_path):
    cache = Cache(tmp_path, Protocol())
    assert run(cache, lambda: CELLS, made_up, 0.0).done == 0
    assert not list(tmp_path.iterdir())


def test_names_of_finished_cells_stay():
    """Of cells that were measured before the engine was shared; computed then."""
    protocol = Protocol()
    assert protocol.key(Cell().without_basis("aligned")) == "420a034d40d23bda"
    assert protocol.key(Cell().without_basis("lora")) == "cc207a474cdaa089"
    assert protocol.key(Cell()) == "dee36ace772e1ed7"
    assert protocol.key(Cell(arm="random")) == "496e7a61f8ece47c"
    assert protocol.adapter_key(LORA) == protocol.adapter_key(replace(LORA, split="test"))
    assert Protocol(limit=3).adapter_key(LORA) == protocol.adapter_key(LORA) != Protocol(rows=3).adapter_key(LORA)


def test_a_damaged_cell_is_named(tmp_path):
    cache = Cache(tmp_path, Protocol())
    cache.path(LORA).write_text("{")
    with pytest.raises(ArtifactError, match="Delete it"):
        cache.get(LORA)
    with pytest.raises(DataError, match=r"Run python -m benchmarks\.frontier"):
        read(cache.path(LORA))
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="Give another folder"):
        Cache(tmp_path / "file", Protocol())
