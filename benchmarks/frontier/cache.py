"""Finished cells as files, and locks between the processes that work on them."""

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

from benchmarks.common import kept_result, publish
from benchmarks.frontier.cells import Cell, Protocol
from peft_safety.errors import ArtifactError

POLL = 1.0
"""Seconds between two tries to take a lock that another process holds."""


class Cache:
    """Finished cells, one complete file each.

    Raises:
        ArtifactError: the folder cannot be made.
    """

    def __init__(self, folder: Path, protocol: Protocol) -> None:
        self.folder, self.protocol = folder, protocol
        self._paths: dict[Cell, Path] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArtifactError(
                f"{folder} cannot be made: {error}. Give another folder for finished cells."
            ) from error

    def path(self, cell: Cell) -> Path:
        """The file of a cell."""
        if cell not in self._paths:
            self._paths[cell] = self.folder / f"{self.protocol.key(cell)}.json"
        return self._paths[cell]

    def get(self, cell: Cell) -> dict[str, Any] | None:
        """The result of a finished cell, or None.

        Raises:
            ArtifactError: its file is damaged.
        """
        return kept_result(self.path(cell))

    def put(self, cell: Cell, result: dict[str, Any]) -> dict[str, Any]:
        """Write a result by one rename.

        Raises:
            ArtifactError: it cannot be written, for example on a full disk. Finished cells do not change.
        """
        row = {"cell": asdict(cell), **result}
        publish(self.path(cell), json.dumps(row))
        return row

    def rows(self, cells: Sequence[Cell]) -> list[dict[str, Any]]:
        """The results of those cells that are finished, each once."""
        return [row for cell in dict.fromkeys(cells) if (row := self.get(cell)) is not None]

    @contextmanager
    def lock(self, name: str, wait: bool = False) -> Iterator[bool]:
        """Lock `name` against other processes. Yields False if another process holds it and `wait` is not set.

        The kernel frees the lock of a process that dies, so there are no stale locks.
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
    """An open and locked file that is still at `path`; None if another process has locked it."""
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
        os.close(handle)  # its last holder deleted it after we opened it
