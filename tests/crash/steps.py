"""Processes that are forked, watched and killed at any call that they make to the file system.

What a process does to the file system is seen by an audit hook, plus wrappers around `os.fsync` and the writer of
safetensors, which no audit event covers.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError

from peft_safety.errors import ArtifactError

EVENTS = {"open": 1, "os.rename": 2, "os.mkdir": 1, "os.rmdir": 1, "os.remove": 1, "os.listdir": 1, "os.scandir": 1}
"""Audit events of the file system, and how many of their arguments are paths."""
SAVED, REFUSED, BROKEN = 0, 10, 20


def watch(root: Path, step: Callable[[str], None]) -> None:
    """Call `step` before every file system call of this process below `root` or by a name in an open directory, and
    before, amid and after every safetensors file. For a forked child only."""

    def hook(event: str, arguments: tuple) -> None:
        paths = [str(argument) for argument in arguments[: EVENTS.get(event, 0)]]
        if any(path.startswith(str(root)) or not os.path.isabs(path) for path in paths):
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
    """Do `work` in a forked process. Returns `SAVED`, `REFUSED` (a typed error), `BROKEN` (any other), or minus the
    signal that killed it.
    """
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


def die(_: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail(code: int) -> Callable[[str], None]:
    def act(event: str) -> None:
        if event.startswith("safetensors") or event == "half a file":
            raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(code)} (os error {code})")
        raise OSError(code, os.strerror(code))

    return act


def at_step(root: Path, at: int, work: Callable[[], object], act: Callable[[str], None] = die) -> int:
    """Do `work` in a child that does `act` at its `at`-th step."""

    def watched() -> None:
        count = 0

        def step(event: str) -> None:
            nonlocal count
            count += 1
            if count == at:
                act(event)

        watch(root, step)
        work()

    return child(watched)


def steps_of(root: Path, work: Callable[[], object]) -> list[str]:
    """What a whole piece of work does, step by step."""
    log = root.parent / "steps"

    def watched() -> None:
        found: list[str] = []
        watch(root, found.append)
        work()
        log.write_text("\n".join(found))

    assert child(watched) == SAVED
    return log.read_text().split("\n")
