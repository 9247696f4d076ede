"""What was answered or judged so far, so that a run that was stopped goes on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

from peft_safety.errors import ArtifactError


class Kept:
    """JSON values by key, in a JSON-lines file that only its owner can read; each is written as soon as it is there.
    A line that a crash cut off counts as none, and several processes may write. Without a path they live as long as
    this object.

    Raises:
        ArtifactError: the file cannot be read or written.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = None if path is None else Path(path)
        self._values = {} if self.path is None else _read(self.path)

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: str, fits: Callable[[Any], bool]) -> Any:
        """The value of a key; None if there is none, or one of another form than is needed."""
        value = self._values.get(key)
        return value if value is not None and fits(value) else None

    def add(self, key: str, value: Any) -> None:
        self._values[key] = value
        if self.path is None:
            return
        line = "\n" + json.dumps({"key": key, "value": value}) + "\n"  # a new line first: the last one may be cut off
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            with os.fdopen(descriptor, "wb", buffering=0) as file:
                if file.write(line.encode()) < len(line):  # ASCII: a byte a character
                    raise OSError("the disk is full")
        except OSError as error:
            raise ArtifactError(
                f"{self.path} cannot be written: {error}. Make room, or give another place."
            ) from error


def key_of(*parts: Any) -> str:
    """A hash of JSON values; of others, such as a table's dates, their text counts."""
    return sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _read(path: Path) -> dict[str, Any]:
    try:
        lines = path.read_bytes().splitlines() if path.is_file() else []
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error}. Give another place.") from error
    result: dict[str, Any] = {}
    for line in filter(None, lines):
        try:
            row = json.loads(line)
            result[row["key"]] = row["value"]
        except (LookupError, RecursionError, TypeError, ValueError):
            continue
    return result
