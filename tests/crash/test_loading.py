"""A load that cannot read the adapter or copy it, for lack of room or a broken disk, is a typed error, and the base
model is as it was. Two processes that save leave whole files.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from peft import PeftModel

from peft_safety.core.publish import staging
from peft_safety.errors import ArtifactError
from tests.crash.steps import BROKEN, REFUSED, SAVED, at_step, child, fail, steps_of
from tests.crash.world import FILES, World
from tests.hostile import tools
from tests.tiny import tiny_llama

pytestmark = [pytest.mark.timeout(120), pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]


@pytest.fixture
def loading(target: Path) -> Callable[[], None]:
    """For a child: its temporary directory is below the one that is watched."""
    base, private = tiny_llama(), target.parent / "private"
    private.mkdir()

    def load() -> None:
        tempfile.tempdir = str(private)
        before = tools.snapshot(base)
        try:
            PeftModel.from_pretrained(base, str(target))
        except ArtifactError:
            after = tools.snapshot(base)
            assert all(value.equal(before["state"][key]) for key, value in after.pop("state").items())
            assert after == {key: value for key, value in before.items() if key != "state"}
            raise

    return load


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["ENOSPC", "EIO"])
def test_a_load_that_cannot_go_on_is_refused(code: int, target: Path, loading: Callable[[], None]) -> None:
    total = len(steps_of(target.parent, loading))
    outcomes = [at_step(target.parent, at, loading, fail(code)) for at in range(1 + (code == errno.EIO), total + 1, 2)]
    print({outcome: outcomes.count(outcome) for outcome in set(outcomes)})
    assert BROKEN not in outcomes
    assert REFUSED in outcomes


def test_a_quota_that_the_copy_exceeds_is_a_typed_error(loading: Callable[[], None]) -> None:
    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        loading()

    assert child(limited) == REFUSED
    assert child(loading) == SAVED


@pytest.mark.parametrize("hosts", [1, 2])
def test_two_processes_that_save_at_once_leave_one_whole_adapter(hosts: int, world: World, target: Path) -> None:
    """On one machine, or as two hosts with equal process ids."""
    number = os.getpid()
    writers = []
    for index, model in enumerate(world.models.values()):
        pid = os.fork()
        if pid == 0:
            if hosts == 2:
                os.getpid, staging._machine = (lambda: number), (lambda own=f"{index:012}": own)
            try:
                for _ in range(12):
                    model.save_pretrained(str(target))
                os._exit(SAVED)
            finally:
                os._exit(BROKEN)
        writers.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in writers] == [SAVED, SAVED]
    assert world.state(target) in ("old", "new")
    assert sorted(path.name for path in target.iterdir()) == FILES
