"""Finished cells as files, and who is working on which."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.common import publish
from benchmarks.frontier.cells import Cell, Protocol
from peft_safety.errors import ArtifactError

POLL = 1.0
"""Seconds between two looks at a lock that another process holds."""


class Cache:
    """Finished cells, one file each, written whole.

    Raises:
        ArtifactError: the folder cannot be made.
    """

    def __init__(self, folder: Path, protocol: Protocol) -> None:
        self.folder, self.protocol = folder, protocol
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArtifactError(
                f"{folder} cannot be made: {error}. Give another folder for finished cells."
            ) from error

    def path(self, cell: Cell) -> Path:
        """Where a cell's result is."""
        return self.folder / f"{self.protocol.key(cell)}.json"

    def get(self, cell: Cell) -> dict[str, Any] | None:
        """A finished cell's result.

        Raises:
            ArtifactError: its file was damaged from outside (files appear by one rename, so a killed run damages
                none).
        """
        path = self.path(cell)
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise ArtifactError(
                f"{path} is no result of a cell: {error}. Delete it; the cell then runs again."
            ) from error
        return found

    def put(self, cell: Cell, result: dict[str, Any]) -> dict[str, Any]:
        """Keep a result, by one rename.

        Raises:
            ArtifactError: it cannot be written (a full disk, say). Finished cells are as they were.
        """
        row = {"cell": asdict(cell), **result}
        publish(self.path(cell), json.dumps(row))
        return row

    def rows(self, cells: Sequence[Cell]) -> list[dict[str, Any]]:
        """Those of these cells that are finished, each once."""
        return [row for cell in dict.fromkeys(cells) if (row := self.get(cell)) is not None]

    @contextmanager
    def lock(self, name: str, wait: bool = False) -> Iterator[bool]:
        """Hold `name` against other processes; gives False when another one holds it and `wait` is not set.

        The kernel drops the lock of a process that dies, so a killed run leaves nothing behind that would have to be
        recognized as stale.
        """
        path = self.folder / f"{name}.lock"
        while (handle := _taken(path)) is None:
            if not wait:
                yield False
                return
            time.sleep(POLL)
        try:
            yield True
        finally:
            path.unlink(missing_ok=True)
            os.close(handle)


def _taken(path: Path) -> int | None:
    """An open, locked file that is still the one at `path`; None when another process has it."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return None
            raise ArtifactError(
                f"{path} cannot be locked: {error}. Keep finished cells on a file system with locks."
            ) from error
        try:
            same = os.fstat(handle).st_ino == path.stat().st_ino
        except FileNotFoundError:
            same = False
        if same:
            os.ftruncate(handle, 0)
            os.write(
                handle,
                json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": round(time.time())}).encode(),
            )
            return handle
        os.close(handle)  # its last holder deleted it between our opening and our locking
