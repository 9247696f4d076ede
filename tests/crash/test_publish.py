"""A save that dies, at any file system call, leaves the complete old adapter or the complete new one; a save that fails says so and leaves the old one.

Every writer is a real process, forked from this one so that nothing is imported twice. What it does to the file system is seen by an audit hook, plus wrappers
around `os.fsync` and the writer of safetensors, which no audit event covers.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import safetensors.torch
import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor, nn

from peft_safety import SaLoRAConfig, verify
from peft_safety.errors import ArtifactError, PeftSafetyError
from tests.hostile import tools
from tests.tiny import tiny_llama

pytestmark = [pytest.mark.timeout(120), pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]

EVENTS = {"open": 1, "os.rename": 2, "os.mkdir": 1, "os.rmdir": 1, "os.remove": 1, "os.listdir": 1, "os.scandir": 1}
"""Audit events of the file system, and how many of their arguments are paths."""
FILES = ["README.md", tools.MANIFEST, tools.ADAPTER, tools.SUBSPACE]
SAVED, REFUSED, BROKEN = 0, 10, 20
NOBODY = 65534


@dataclass
class World:
    """One base with two states of an adapter on it."""

    base: nn.Module
    models: dict[str, nn.Module]
    folders: dict[str, Path]
    logits: dict[str, Tensor]
    digests: dict[str, str] = field(default_factory=dict)

    def state(self, directory: Path, subfolder: str = "") -> str:
        """Which of the two adapters a directory holds: it is checked every time, and its logits are compared once for each distinct content."""
        verify(directory / subfolder)
        digest = contents(directory / subfolder)
        if digest not in self.digests:
            loaded = PeftModel.from_pretrained(tiny_llama(), str(directory), subfolder=subfolder or None)
            matches = [name for name, expected in self.logits.items() if torch.equal(loaded(tools.tokens()).logits, expected)]
            assert len(matches) == 1, "neither the old nor the new function"
            self.digests[digest] = matches[0]
        return self.digests[digest]


def contents(directory: Path) -> str:
    return hashlib.sha256(b"".join((directory / name).read_bytes() for name in FILES[1:])).hexdigest()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("world")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        space = tools.subspace(tiny_llama())
        models = {name: tools.trained(tiny_llama(), space, seed) for seed, name in enumerate(("old", "new"))}
        for name, model in models.items():
            model.save_pretrained(str(root / name))
        logits = {name: model(tools.tokens()).logits for name, model in models.items()}
        assert not torch.equal(logits["old"], logits["new"])
        yield World(tiny_llama(), models, {name: root / name for name in models}, logits)


@pytest.fixture
def target(world: World, tmp_path: Path) -> Path:
    return Path(shutil.copytree(world.folders["old"], tmp_path / "adapter"))


def watch(root: Path, step: Callable[[str], None]) -> None:
    """Call `step` before every file system call of this process below `root`, and before, amid and after every safetensors file. For a forked child only."""

    def hook(event: str, arguments: tuple) -> None:
        if event in EVENTS and any(str(argument).startswith(str(root)) for argument in arguments[: EVENTS[event]]):
            step(event)

    fsync, write = os.fsync, safetensors.torch.serialize_file

    def synced(descriptor: int) -> None:
        step("fsync")
        fsync(descriptor)

    def written(content: dict, path: object, **rest: object) -> None:
        step("safetensors")
        Path(str(path)).write_bytes(b"\0" * 100)  # a part of it
        step("half a file")
        write(content, path, **rest)
        step("safetensors done")

    os.fsync, safetensors.torch.serialize_file = synced, written
    sys.addaudithook(hook)


def child(work: Callable[[], None]) -> int:
    """Do `work` in a forked process. Returns `SAVED`, `REFUSED` (a typed error), `BROKEN` (any other), or minus the signal that killed it."""
    pid = os.fork()
    if pid == 0:
        code = BROKEN
        try:
            warnings.simplefilter("ignore")
            work()
            code = SAVED
        except ArtifactError:
            code = REFUSED
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def save(world: World, directory: Path, at: int, act: Callable[[str], None], model: str = "new") -> int:
    """Save in a child that does `act` at its `at`-th step."""

    def work() -> None:
        count = 0

        def step(event: str) -> None:
            nonlocal count
            count += 1
            if count == at:
                act(event)

        watch(directory, step)
        world.models[model].save_pretrained(str(directory))

    return child(work)


def steps(world: World, directory: Path, tmp_path: Path, model: str = "new") -> list[str]:
    """What a whole save does, step by step."""
    log = tmp_path / "steps"

    def work() -> None:
        found: list[str] = []
        watch(directory, found.append)
        world.models[model].save_pretrained(str(directory))
        log.write_text("\n".join(found))

    assert child(work) == SAVED
    return log.read_text().split("\n")


def die(_: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail(code: int) -> Callable[[str], None]:
    def act(event: str) -> None:
        if event.startswith("safetensors") or event == "half a file":
            raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(code)} (os error {code})")
        raise OSError(code, os.strerror(code))

    return act


def test_a_save_killed_at_any_step_leaves_the_old_adapter_or_the_new_one(world: World, target: Path, tmp_path: Path) -> None:
    total = len(steps(world, target, tmp_path))
    assert total > 30
    seen = []
    for at in range(1, total + 1):
        shutil.rmtree(target)
        shutil.copytree(world.folders["old"], target)
        assert save(world, target, at, die) == -signal.SIGKILL, f"step {at} of {total}"
        seen.append(world.state(target))
        if at % 3:
            continue
        world.models["old"].save_pretrained(str(target))  # and the next save works, and sweeps up
        assert world.state(target) == "old"
        assert sorted(path.name for path in target.iterdir()) == FILES, f"litter after step {at}"
    flips = sum(first != second for first, second in itertools.pairwise(seen))
    assert (seen[0], seen[-1], flips) == ("old", "new", 1), "one commit point"


def test_a_first_save_killed_at_any_step_leaves_nothing_or_the_whole(world: World, tmp_path: Path) -> None:
    target = tmp_path / "fresh"
    total = len(steps(world, target, tmp_path))
    complete = 0
    for at in range(1, total + 1, 2):
        shutil.rmtree(target, ignore_errors=True)
        assert save(world, target, at, die) == -signal.SIGKILL
        try:
            complete += world.state(target) == "new"
        except PeftSafetyError:
            assert complete == 0, "whole once, whole ever after"
    assert complete > 1


def test_two_adapters_of_one_model_are_saved_together(world: World, tmp_path: Path) -> None:
    """A reader of either finds the old pair or the new pair, whichever it opens first."""
    target = tmp_path / "pair"
    pair = {}
    for name, model in world.models.items():
        pair[name] = tools.trained(tiny_llama(), model.peft_config["default"].subspace, seed=["old", "new"].index(name))
        pair[name].add_adapter("second", SaLoRAConfig(r=4, lora_alpha=16, subspace=model.peft_config["default"].subspace, target_modules="all-linear"))
        for module in pair[name].modules():
            if hasattr(module, "lora_B") and "second" in module.lora_B:
                module.lora_A["second"].weight.data.copy_(module.lora_A["default"].weight.data)
                module.lora_B["second"].weight.data.copy_(module.lora_B["default"].weight.data)
    both = World(world.base, pair, {}, world.logits)
    pair["old"].save_pretrained(str(target))
    pair["old"].save_pretrained(str(target))  # over itself: a sub-directory that is there is no obstacle
    old = Path(shutil.copytree(target, tmp_path / "old_pair"))
    total = len(steps(both, target, tmp_path))
    assert [both.state(target), both.state(target, "second")] == ["new", "new"]
    seen = []
    for at in [*range(1, total - 25, 11), *range(total - 25, total + 1)]:
        shutil.rmtree(target)
        shutil.copytree(old, target)
        assert save(both, target, at, die) == -signal.SIGKILL
        order = ("", "second") if at % 2 else ("second", "")
        states = [both.state(target, subfolder) for subfolder in order]
        assert states[0] == states[1], f"step {at} of {total}"
        seen.append(states[0])
    assert {"old", "new"} == set(seen)


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
        assert world.state(target) in ("old", "new")
    world.models["new"].save_pretrained(str(target))
    assert sorted(path.name for path in target.iterdir()) == FILES


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["ENOSPC", "EIO"])
def test_a_failing_call_is_a_typed_error_and_the_old_adapter_stays(code: int, world: World, target: Path, tmp_path: Path) -> None:
    total = len(steps(world, target, tmp_path))
    seen, outcomes = [], set()
    for at in range(1 + (code == errno.EIO), total + 1, 2):
        shutil.rmtree(target)
        shutil.copytree(world.folders["old"], target)
        outcome = save(world, target, at, fail(code))
        assert outcome in (SAVED, REFUSED), f"an untyped error at step {at} of {total}"
        outcomes.add(outcome)
        untouched = contents(target) == contents(world.folders["old"]) and sorted(path.name for path in target.iterdir()) == FILES
        seen.append(world.state(target))
        assert seen[-1] == "new" if outcome == SAVED else (seen[-1] == "new" or untouched), f"step {at}"
        assert sorted(path.name for path in target.iterdir()) == FILES, f"litter after step {at}"
    assert REFUSED in outcomes
    assert seen.count("old") > len(seen) / 2, "most of a save lies before its commit point"


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


def test_an_unfinished_save_in_a_read_only_directory_is_a_typed_error(world: World, public: Path) -> None:
    shutil.copytree(world.folders["new"], public / ".commit")

    def load() -> None:
        without_rights(public)
        verify(public)

    assert child(load) == REFUSED
    public.chmod(0o755)
    assert world.state(public) == "new"


def test_readers_that_finish_a_save_together_do_not_disturb_each_other(world: World, target: Path) -> None:
    for _ in range(5):
        shutil.copytree(world.folders["new"], target / ".commit")
        readers = []
        for _ in range(4):
            pid = os.fork()
            if pid == 0:
                try:
                    verify(target)
                    os._exit(SAVED)
                except BaseException:
                    traceback.print_exc()
                    os._exit(BROKEN)
            readers.append(pid)
        assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in readers] == [SAVED] * 4
        assert world.state(target) == "new"


def test_the_litter_of_a_live_writer_is_left_alone(world: World, target: Path) -> None:
    alive = target / f".staging-{os.getppid()}-x"
    dead = target / ".staging-99999999999999999999-x"
    odd = target / ".staging-²-x"
    for path in (alive, dead, odd):
        path.mkdir()
    world.models["new"].save_pretrained(str(target))
    assert alive.exists()
    assert odd.exists()
    assert not dead.exists()
    assert world.state(target) == "new"
