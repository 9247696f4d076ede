"""A save that dies, at any file system call, leaves the complete old adapter or the complete new one, if need be after
`recover`; a reader loads one of the two or is told to recover; a save that fails says so.

Every writer is a real process, forked from this one so that nothing is imported twice.
"""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model

from peft_safety import SaLoRAConfig, verify
from peft_safety.core.publish import recover
from peft_safety.errors import ArtifactError, PeftSafetyError
from tests.crash.steps import BROKEN, REFUSED, SAVED, child, fail
from tests.crash.world import FILES, World, contents, save, steps
from tests.hostile import tools
from tests.tiny import tiny_llama

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.filterwarnings("ignore:.*interrupted publish"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
]
NOBODY = 65534


def some(total: int, tail: int, every: int) -> list[int]:
    """Steps to be killed at: all of the last `tail`, where the commit point lies, and a few before."""
    return [*range(1, total - tail, every), *range(max(total - tail, 1), total + 1)]


@pytest.mark.parametrize("every", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_a_save_killed_at_any_step_leaves_the_old_adapter_or_the_new_one(
    every: int, world: World, target: Path
) -> None:
    names = steps(world, target)
    total, commit = len(names), len(names) - names[::-1].index("os.mkdir")
    read, recovered = [], []
    for at in some(total, 36, 15)[::every]:
        shutil.rmtree(target)
        shutil.copytree(world.folders["old"], target)
        assert save(world, target, at) == -signal.SIGKILL, f"step {at} of {total}"
        read.append(world.state(target))
        recover(target)
        recovered.append(world.state(target))
        assert read[-1] in (recovered[-1], "interrupted", "old")
        if at % 5:
            continue
        world.models["old"].save_pretrained(str(target))  # and the next save works, and sweeps up
        assert world.state(target) == "old"
        assert sorted(path.name for path in target.iterdir()) == FILES, f"litter after step {at}"
    assert commit < total
    assert recovered == sorted(recovered, reverse=True), "one commit point: old, then new"
    assert set(recovered) == {"old", "new"}
    assert read == sorted(read, key=["old", "interrupted", "new"].index), (
        "and one moment after which everything is in place"
    )
    assert set(read) == {"old", "interrupted", "new"}


def test_the_next_save_finishes_what_was_cut_off(world: World, target: Path) -> None:
    total = len(steps(world, target))
    seen = set()
    for at in range(total - 20, total, 3):
        assert save(world, target, at) == -signal.SIGKILL
        seen.add(world.state(target))
        world.models["old"].save_pretrained(str(target))
        assert world.state(target) == "old"
        assert sorted(path.name for path in target.iterdir()) == FILES
    assert "interrupted" in seen


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_a_first_save_killed_at_any_step_leaves_nothing_or_the_whole(every: int, world: World, tmp_path: Path) -> None:
    target = tmp_path / "fresh"
    total = len(steps(world, target))
    complete = 0
    for at in some(total, 26, 24)[::every]:
        shutil.rmtree(target, ignore_errors=True)
        assert save(world, target, at) == -signal.SIGKILL
        waits = (target / ".commit").exists()
        if waits and not (target / tools.MANIFEST).exists():
            with pytest.raises(ArtifactError, match="peft-safety recover"):
                PeftModel.from_pretrained(tiny_llama(), str(target))
        if waits:
            recover(target)
        if waits or complete:
            assert world.state(target) == "new", "whole once, whole ever after"
            complete += 1
        else:
            with pytest.raises(PeftSafetyError):
                verify(target)
    assert complete > 3


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_two_adapters_of_one_model_are_saved_together(every: int, world: World, tmp_path: Path) -> None:
    """A reader of either finds the old pair or the new pair, or is sent to the directory of both."""
    target = tmp_path / "pair"
    pair = {}
    for name, model in world.models.items():
        pair[name] = tools.trained(
            tiny_llama(), model.peft_config["default"].subspace, seed=["old", "new"].index(name)
        )
        pair[name].add_adapter(
            "second",
            SaLoRAConfig(
                r=4, lora_alpha=16, subspace=model.peft_config["default"].subspace, target_modules="all-linear"
            ),
        )
        for module in pair[name].modules():
            if hasattr(module, "lora_B") and "second" in module.lora_B:
                module.lora_A["second"].weight.data.copy_(module.lora_A["default"].weight.data)
                module.lora_B["second"].weight.data.copy_(module.lora_B["default"].weight.data)
    both = World(world.base, pair, {}, world.logits)
    pair["old"].save_pretrained(str(target))
    pair["old"].save_pretrained(str(target))  # over itself: a sub-directory that is there is no obstacle
    old = Path(shutil.copytree(target, tmp_path / "old_pair"))
    total = len(steps(both, target))
    assert [both.state(target), both.state(target, "second")] == ["new", "new"]
    seen = []
    for at in some(total, 44, 60)[::every]:
        shutil.rmtree(target)
        shutil.copytree(old, target)
        assert save(both, target, at) == -signal.SIGKILL
        states = [both.state(target), both.state(target, "second")]
        assert states[0] == states[1], f"step {at} of {total}"
        seen.append(states[0])
        if states[0] == "interrupted":
            with pytest.raises(ArtifactError, match=f"recover {target}"):
                recover(target / "second")
            with pytest.raises(ArtifactError, match=f"recover {target}"):
                world.models["old"].save_pretrained(str(target / "second"))
        recover(target)
        states = [both.state(target), both.state(target, "second")]
        assert states[0] == states[1] != "interrupted"
    assert set(seen) == {"old", "interrupted", "new"}


def test_a_writer_killed_at_any_moment_leaves_one_of_the_two(world: World, target: Path) -> None:
    chooser = random.Random(0)

    def forever() -> None:
        while True:
            for model in ("new", "old"):
                world.models[model].save_pretrained(str(target))

    for _ in range(12):
        pid = os.fork()
        if pid == 0:
            warnings.simplefilter("ignore")
            forever()
        time.sleep(chooser.uniform(0.05, 0.25))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        recover(target)
        assert world.state(target) in ("old", "new")
    world.models["new"].save_pretrained(str(target))
    assert sorted(path.name for path in target.iterdir()) == FILES


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["ENOSPC", "EIO"])
def test_a_failing_call_is_a_typed_error_and_the_old_adapter_stays(
    code: int, world: World, target: Path, tmp_path: Path
) -> None:
    total = len(steps(world, target))
    seen, outcomes = [], set()
    for at in some(total, 40, 12)[code == errno.EIO :: 4]:
        shutil.rmtree(target)
        shutil.copytree(world.folders["old"], target)
        outcome = save(world, target, at, fail(code))
        assert outcome in (SAVED, REFUSED), f"an untyped error at step {at} of {total}"
        outcomes.add(outcome)
        untouched = (
            contents(target) == contents(world.folders["old"])
            and sorted(path.name for path in target.iterdir()) == FILES
        )
        waits = (target / ".commit").exists()
        recover(target)
        seen.append(world.state(target))
        assert seen[-1] == "new" if outcome == SAVED else (waits or seen[-1] == "new" or untouched), f"step {at}"
        if seen[-1] == "new":  # what could not be removed, the next save sweeps
            world.models["new"].save_pretrained(str(target))
        assert sorted(path.name for path in target.iterdir()) == FILES, f"litter after step {at}"
    assert REFUSED in outcomes
    assert set(seen) == {"old", "new"}


def test_a_disk_quota_is_a_typed_error(world: World, target: Path) -> None:
    """The kernel itself refuses to write on, in whatever writes the file."""

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        world.models["new"].save_pretrained(str(target))

    assert child(work) == REFUSED
    assert world.state(target) == "old"
    assert sorted(path.name for path in target.iterdir()) == FILES


@pytest.fixture
def public(world: World) -> Iterator[Path]:
    """A directory that another user can reach."""
    root = Path(tempfile.mkdtemp())
    root.chmod(0o755)
    target = Path(shutil.copytree(world.folders["old"], root / "adapter"))
    yield target
    for path in (root, target):
        path.chmod(0o755)
    shutil.rmtree(root)


def without_rights(directory: Path) -> None:
    directory.chmod(0o555)
    if os.geteuid() == 0:
        os.setuid(NOBODY)


def test_a_read_only_directory_can_be_loaded_and_not_overwritten(world: World, public: Path) -> None:
    def load() -> None:
        without_rights(public)
        assert verify(public).modules == 14

    def overwrite() -> None:
        without_rights(public)
        world.models["new"].save_pretrained(str(public))

    def elsewhere() -> None:
        without_rights(public)
        world.models["new"].save_pretrained(str(public / "new"))

    assert child(load) == SAVED
    assert child(overwrite) == REFUSED
    assert child(elsewhere) == REFUSED
    public.chmod(0o755)
    assert world.state(public) == "old"
    assert sorted(path.name for path in public.iterdir()) == FILES


def interrupted(world: World, target: Path) -> None:
    """A save is killed in the middle of its moves."""
    moves = [at for at, event in enumerate(steps(world, target), start=1) if event == "os.rename"]
    shutil.rmtree(target)
    shutil.copytree(world.folders["old"], target)
    assert save(world, target, moves[-2]) == -signal.SIGKILL
    assert world.state(target) == "interrupted"


def test_an_interrupted_save_in_a_read_only_directory_can_neither_be_read_nor_finished(
    world: World, public: Path
) -> None:
    interrupted(world, public)

    def load() -> None:
        without_rights(public)
        verify(public)

    def finish() -> None:
        without_rights(public)
        recover(public)

    assert child(load) == REFUSED
    assert child(finish) == REFUSED
    public.chmod(0o755)
    recover(public)
    assert world.state(public) == "new"


def test_processes_that_finish_a_save_together_do_not_disturb_each_other(world: World, target: Path) -> None:
    for _ in range(3):
        interrupted(world, target)
        workers = []
        for _ in range(4):
            pid = os.fork()
            if pid == 0:
                try:
                    recover(target)
                    verify(target)
                    os._exit(SAVED)
                except BaseException:
                    traceback.print_exc()
                    os._exit(BROKEN)
            workers.append(pid)
        assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in workers] == [SAVED] * 4
        assert world.state(target) == "new"


def test_a_plain_lora_that_is_saved_over_an_interrupted_save_is_not_undone_later(world: World, target: Path) -> None:
    interrupted(world, target)
    plain = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    plain.save_pretrained(str(target))
    assert recover(target) == []
    assert PeftConfig.from_pretrained(str(target)).peft_type == "LORA"


def test_an_interrupted_save_that_moved_nothing_yet_is_read_as_it_was_with_one_warning(
    world: World, target: Path
) -> None:
    moves = [at for at, event in enumerate(steps(world, target), start=1) if event == "os.rename"]
    shutil.rmtree(target)
    shutil.copytree(world.folders["old"], target)
    assert save(world, target, moves[-5]) == -signal.SIGKILL
    for read in (verify, lambda d: PeftModel.from_pretrained(tiny_llama(), str(d))):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            read(target)
        assert ["peft-safety recover" in str(w.message) for w in caught if "interrupted" in str(w.message)] == [True]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert world.state(target) == "old"
