"""A private copy of an adapter directory, made in one go: what is checked is what is loaded, whatever another process
does to the directory meanwhile.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from peft_safety.core import files, publish
from peft_safety.core.certificate import FILE_NAME as CERTIFICATE
from peft_safety.core.plain_lora import ADAPTER_FILE, MANIFEST
from peft_safety.core.subspace_file import FILE_NAME as SUBSPACE
from peft_safety.errors import ArtifactError, PeftSafetyError

LISTING = files.MAX_LISTING_BYTES
LIMITS = {MANIFEST: LISTING, CERTIFICATE: LISTING, SUBSPACE: None, ADAPTER_FILE: None}
"""The files that are copied, with the bytes that a JSON file may have. A safetensors file says how long it is."""
LARGE = 1 << 26
"""From this size on, a file's header must account for its size, and its bytes must be on the disk."""
PATIENCE = 10.0
"""Seconds in which the files must stay as they are for long enough to be copied."""
PAUSE = 0.02


class Snapshot:
    """Copies of an adapter's files in a temporary directory, which goes with this object. `source` is the directory
    that was copied, `path` the copy, `worst_leak` that of its factors, once they are checked. An ArtifactError refuses
    what is no regular file, claims more than it holds, or keeps changing, and a mixture of two saves.
    """

    _live: ClassVar[weakref.WeakValueDictionary[Path, Snapshot]] = weakref.WeakValueDictionary()

    def __init__(self, source: Path, warn: bool = False) -> None:
        try:
            self.source, self.path = source, Path(tempfile.mkdtemp(prefix="peft_safety-"))
            self.worst_leak = math.inf
        except OSError as error:
            raise ArtifactError(f"{source} cannot be copied: {error}. Set TMPDIR to a writable directory.") from error
        weakref.finalize(self, _remove, self.path, os.getpid())
        self._live[self.path] = self
        end = time.monotonic() + PATIENCE
        while True:
            before, problem = _states(source), None
            try:
                self._fill()
                publish.require_whole(source, warn=warn)  # waits for a save that is moving its files
            except ArtifactError as error:
                problem = error
            except OSError as error:
                what = f"{source} cannot be copied to {self.path}: {error.strerror}"
                problem = ArtifactError(f"{what}. Make room there, and copy the directory again.")
            if _states(source) == before:
                break
            if time.monotonic() > end:
                raise ArtifactError(f"{source} changed while it was read: another process saves into it. Try again.")
            time.sleep(PAUSE)
        if problem is not None:
            raise problem

    def __deepcopy__(self, memo: Any) -> Snapshot:
        return self

    def __reduce__(self) -> Any:
        return type(None), ()  # another process has no copy

    @classmethod
    def of(cls, path: Path) -> Snapshot | None:
        """The snapshot whose copy is at this path."""
        return cls._live.get(path)

    def comes_from(self, source: str | os.PathLike[str], subfolder: str | None) -> bool:
        given = Path(source, subfolder or "")
        return given == self.path or os.path.realpath(given) == os.path.realpath(self.source)

    def _fill(self) -> None:
        for name, limit in LIMITS.items():
            (self.path / name).unlink(missing_ok=True)
            _copy(files.child(self.source, name), self.path / name, limit)
        for file in self.source.glob("adapter_model*"):
            if file.suffix in files.PICKLES:
                (self.path / file.name).touch()  # its name alone, so that it is refused


@contextmanager
def reading(source: str | os.PathLike[str], warn: bool = False) -> Iterator[Path]:
    """The path of a snapshot that lives for the block; of a snapshot's own path, and where no directory is, itself."""
    path = Path(source)
    if Snapshot.of(path) is not None or not path.is_dir():
        yield path
        return
    snapshot = Snapshot(path, warn)
    with named(snapshot):
        yield snapshot.path


@contextmanager
def named(snapshot: Snapshot | None) -> Iterator[None]:
    """Errors name the directory that was copied, not the copy, which may become unreadable."""
    try:
        yield
    except OSError as error:
        if snapshot is None:
            raise
        raise ArtifactError(f"the copy of {snapshot.source} cannot be read: {error}. Load it again.") from error
    except PeftSafetyError as error:
        if snapshot is not None:
            error.args = tuple(str(text).replace(str(snapshot.path), str(snapshot.source)) for text in error.args)
        raise


def _remove(path: Path, owner: int) -> None:
    """Forked processes, such as the workers of a data loader, leave it alone."""
    if os.getpid() == owner:
        shutil.rmtree(path, ignore_errors=True)


def _states(directory: Path) -> list[tuple[int, ...] | None]:
    """What changes whenever a file is replaced or written."""
    states: list[tuple[int, ...] | None] = []
    for name in LIMITS:
        try:
            status = os.stat(directory / name)
            states.append((status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
        except OSError:
            states.append(None)
    return states


def _copy(path: Path, target: Path, limit: int | None) -> None:
    """Copy a file, of JSON one byte more than is allowed; nothing if there is none."""
    if not os.path.lexists(path):
        return
    with files.regular(path) as file, target.open("wb") as copy:
        status = os.fstat(file.fileno())
        remaining = status.st_size if limit is None else limit + 1
        if limit is None and status.st_size > LARGE:
            stored = getattr(status, "st_blocks", status.st_size) * 512
            if stored < status.st_size // 8:
                what = f"{status.st_size} bytes in the directory, {stored} on the disk"
                raise ArtifactError(f"{path} is not a complete safetensors file ({what}). Copy or save it again.")
            with files.open_tensors(path):
                pass  # its header accounts for its size
        while remaining > 0 and (block := file.read(min(remaining, 1 << 20))):
            copy.write(block)
            remaining -= len(block)
