"""Staging folders: a live writer holds a lock on its own, and the litter of dead ones is swept.

The name holds a hash of this machine's name and of its boot. Of this boot, a folder whose lock can be had has lost its
writer and goes at once; any other goes after a day in which nothing in it was written.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import secrets
import shutil
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from peft_safety.core.publish.folder import BY_DESCRIPTOR, closing
from peft_safety.core.publish.journal import NAME, STAGING

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows: nothing is known to be dead, so the day decides
    fcntl = None

DAY = 24 * 60 * 60.0
"""Seconds after which a folder is removed even if it is unknown whether its writer is alive."""
PAUSE = 0.01


class Staging(NamedTuple):
    """A folder to write into, and the descriptor of its journal, locked for as long as this process works on it."""

    path: Path
    descriptor: int

    @classmethod
    def make(cls, target: Path) -> Staging:
        """Make a new folder. If another process removes it before it is locked, try again."""
        for _ in range(100):
            path = new_name(target)
            path.mkdir()
            with suppress(FileNotFoundError):
                descriptor = os.open(path / NAME, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
                if lock(descriptor) is not False and (path / NAME).exists():
                    return cls(path, descriptor)
                os.close(descriptor)
        raise FileNotFoundError(f"{path} was removed by somebody else")


def new_name(target: Path) -> Path:
    return target / f"{STAGING}{_machine()}-{secrets.token_hex(8)}"


def discard(path: Path) -> None:
    """Remove a folder, its journal last: if this is interrupted, a later sweep still recognizes the rest."""
    with suppress(OSError):
        for inner in path.iterdir():
            if inner.is_dir() and not inner.is_symlink():
                shutil.rmtree(inner, ignore_errors=True)
            elif inner.name != NAME:
                inner.unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def lock(descriptor: int, shared: bool = False, seconds: float = 0.0) -> bool | None:
    """Lock a journal: True on success, False if a live process holds the lock, None if locks are not supported."""
    if fcntl is None:
        return None
    end = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
            time.sleep(PAUSE)
        except OSError:  # a network file system without locks
            return None
        else:
            return True


def sweep(target: Path, now: float) -> None:
    """Remove the litter of dead writers. `now` is the disk's time: a shared disk may have another clock."""
    with os.scandir(target) as entries:
        staged = [e.name for e in entries if e.name.startswith(STAGING) and e.is_dir(follow_symlinks=False)]
    for name in staged:
        with suppress(OSError):  # somebody else sweeps too
            own = name.startswith(f"{STAGING}{_machine()}-")
            if not (own and _sweep_own(target / name)) and now - _written(target / name) > DAY:
                discard(target / name)


def _sweep_own(path: Path) -> bool:
    """Remove a folder of this boot if its writer is dead. Returns whether the writer's state was known."""
    if not any(path.iterdir()):
        path.rmdir()  # its writer, if alive, makes another
        return True
    try:
        descriptor = os.open(path / NAME, os.O_RDWR | (os.O_NOFOLLOW | os.O_NONBLOCK if BY_DESCRIPTOR else 0))
    except FileNotFoundError:
        return False
    with closing(descriptor):
        held = lock(descriptor)
        if held:
            discard(path)
    if held and path.exists():  # network file systems keep a removed file until it is closed
        discard(path)
    return held is not None


def _written(path: Path) -> float:
    inner = [Path(folder, name) for folder, _, names in os.walk(path) for name in (".", *names)]
    return max(place.lstat().st_mtime for place in (path, *inner))


@functools.cache
def _machine() -> str:
    """An id of this machine since its last boot. Two containers of one machine differ by host name."""
    try:
        since = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    except OSError:
        since = str(uuid.getnode())
    return hashlib.sha256(f"{platform.node()}|{since}".encode()).hexdigest()[:12]
