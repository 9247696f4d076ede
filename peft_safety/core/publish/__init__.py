"""Saves that may be killed: files are published whole, a reader never writes, and the next writer finishes the rest.

A publish writes and syncs everything, with a journal, in a hidden staging folder inside the directory; renames that
folder to `.commit` (the commit point); moves the files into place, the manifest last; and renames `.commit` away. A
kill before the commit point leaves the old files and litter. A kill after it leaves a `.commit` whose journal says
which files still wait: all (the old files are whole), some (a mixture, which nobody may read) or none.
"""

from __future__ import annotations

import errno
import os
import shlex
import stat
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from peft_safety.core.publish.folder import Folder, closing
from peft_safety.core.publish.journal import COMMIT, MAX_DEPTH, NAME, Journal
from peft_safety.core.publish.staging import PAUSE, Staging, discard, lock, new_name, sweep
from peft_safety.errors import ArtifactError

PATIENCE = 10.0
"""Seconds to wait for another process that is moving its files into place."""
GLANCE = 0.5
"""Seconds in which a `.commit` without a journal may turn out to be one that another writer has just finished."""


@contextmanager
def publishing(target: Path, manifest: str) -> Iterator[Path]:
    """Write files into the staging directory that is yielded: a reader of `target` sees the old set or the new one,
    wherever the writer dies. An ArtifactError says whether nothing has changed, or the new files wait for `recover`.
    """
    staging: Staging | None = None
    try:
        try:
            target.mkdir(parents=True, exist_ok=True)
            recover(target)
            staging = Staging.make(target)
            sweep(target, staging.path.stat().st_mtime)
            yield staging.path
            journal = _prepare(staging, target, manifest)
            if journal.entries:
                _commit(staging, target)
        except (OSError, SafetensorError) as error:
            remedy = "Its files are unchanged; free space or choose another directory."
            raise ArtifactError(f"{target} could not be written: {error}. {remedy}") from error
        if journal.entries:
            _finish(target, journal)
    finally:
        if staging is not None:
            discard(staging.path)
            os.close(staging.descriptor)


def recover(directory: Path) -> list[str]:
    """Finish a publish that was cut off after its commit point, and return the files that were moved into place. An
    ArtifactError says that it is none of this package, is not complete, or that another process works on it.
    """
    if not directory.is_dir():
        raise ArtifactError(f"{directory} is not a directory. Give the directory that was saved into.")
    for owner, _ in _owners(directory):
        raise ArtifactError(f"{directory} is part of an {_interrupted(owner)}")
    try:
        with _looked_up(directory, write=True) as found:
            if found is None:
                return []
            target, commit, descriptor = found
            if lock(descriptor, seconds=PATIENCE) is False:
                raise ArtifactError(f"{directory} is being saved into by another process. Try again later.")
            if not _is_current(target, commit):  # it was finished meanwhile
                return []
            journal = Journal.read(descriptor, commit.path / NAME)
            journal.check(target, commit)
            return _finish(directory, journal)
    except OSError as error:
        remedy = "Make the directory writable, and remove what is in the way."
        raise ArtifactError(f"The publish that waits in {directory} cannot be finished ({error}). {remedy}") from error


def is_interrupted(directory: Path) -> bool:
    with suppress(ArtifactError, OSError):
        return _journal(directory) is not None
    return False


def require_whole(directory: Path, ours: bool = True, warn: bool = True) -> None:
    """An ArtifactError refuses files that may be a mixture of two publishes. Old files that are complete are read,
    with a warning if `warn`. `ours`: refuse a `.commit` that this package did not write.
    """
    try:
        journal = _journal(directory)
    except (ArtifactError, OSError) as error:
        if not ours:
            return
        reason = error if isinstance(error, ArtifactError) else f"{directory / COMMIT} cannot be read: {error}."
        raise ArtifactError(f"{directory} does not say whether it is whole: {reason}") from error
    if journal is not None:
        _require_whole(directory, directory, journal, warn)
    for owner, journal in _owners(directory):
        _require_whole(directory, owner, journal, warn)


def _require_whole(directory: Path, owner: Path, journal: Journal, warn: bool) -> None:
    end = time.monotonic() + PATIENCE
    while True:
        try:
            with _pending(owner) as (target, commit, descriptor):
                if lock(descriptor, shared=True) is not False:
                    state = journal.state(target, commit)
                    break
        except FileNotFoundError:  # its writer is done
            return
        except OSError as error:
            raise ArtifactError(f"{owner} holds an {_interrupted(owner)} It cannot be read: {error}.") from error
        if time.monotonic() > end:
            raise ArtifactError(f"{owner} is being saved into by another process. Read it when that is done.")
        time.sleep(PAUSE)
    if state == "old" and (directory / journal.manifest).is_file():
        if warn:
            warnings.warn(f"{owner} holds an {_interrupted(owner)} Until then the old files are read.", stacklevel=4)
    elif state != "new":
        whose = "" if owner == directory else f" {directory} is part of it."
        raise ArtifactError(f"{owner} holds an {_interrupted(owner)}{whose}")


def copy_own(directory: Path, name: str, staging: Path) -> None:
    """Copy a file of a directory into a staging folder, if it exists; no link, which may lead to private files."""
    with Folder.open(directory) as folder:
        if folder.stat(name) is None:
            return
        try:
            with folder.file(name) as descriptor, os.fdopen(os.dup(descriptor), "rb") as source:
                (staging / name).write_bytes(source.read())
        except ArtifactError as error:
            warnings.warn(f"{error} It is not taken over into what is saved.", stacklevel=4)


def _interrupted(owner: Path) -> str:
    return f"interrupted publish, finish it with `peft-safety recover {shlex.quote(str(owner))}`."


@contextmanager
def _pending(directory: Path, write: bool = False) -> Iterator[tuple[Folder, Folder, int]]:
    with Folder.open(directory) as target, target.sub(COMMIT) as commit, commit.file(NAME, write=write) as descriptor:
        yield target, commit, descriptor


@contextmanager
def _looked_up(directory: Path, write: bool = False) -> Iterator[tuple[Folder, Folder, int] | None]:
    """`_pending`; None without a `.commit`. One without a journal, which may just be finished, is looked at again."""
    with ExitStack() as stack:
        found, end = None, time.monotonic() + GLANCE
        while found is None and os.path.lexists(directory / COMMIT):
            try:
                found = stack.enter_context(_pending(directory, write))
            except FileNotFoundError as error:
                if time.monotonic() > end and os.path.lexists(directory / COMMIT):
                    raise ArtifactError(
                        f"{directory / COMMIT} has no journal of peft_safety. Remove it, or copy the directory again."
                    ) from error
                time.sleep(PAUSE)
        yield found


def _is_current(target: Folder, commit: Folder) -> bool:
    status = target.stat(COMMIT)
    return status is not None and status.st_ino == commit.inode()


def _owners(directory: Path) -> Iterator[tuple[Path, Journal]]:
    """Parent directories with an interrupted publish that has files in this directory."""
    real = directory.resolve()
    for depth, above in enumerate(list(real.parents)[: MAX_DEPTH - 1], start=1):
        with suppress(ArtifactError, OSError):  # not a publish of ours, so it has nothing in here
            journal = _journal(above)
            if journal is not None and any(entry.parts[:depth] == real.parts[-depth:] for entry in journal.entries):
                yield above, journal


def _journal(owner: Path) -> Journal | None:
    """The journal of an interrupted publish; None without one, or if it was finished meanwhile."""
    with _looked_up(owner) as found:
        return None if found is None else Journal.read(found[2], found[1].path / NAME)


def _prepare(staging: Staging, target: Path, manifest: str) -> Journal:
    """Give all files the usual permissions, flush them to the disk, and write the journal."""
    mode = stat.S_IMODE(os.fstat(staging.descriptor).st_mode)
    for folder, _, names in os.walk(staging.path, topdown=False):
        for path in (Path(folder, name) for name in names):
            if path.is_symlink() or not path.is_file():
                raise ArtifactError(f"{path} is no regular file. Only files can be saved.")
            path.chmod(mode)  # safetensors gives its files to the owner alone
            descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
            with closing(descriptor):
                os.fsync(descriptor)
        with suppress(OSError):  # only the empty ones go
            os.rmdir(folder)
    with Folder.open(target) as place, Folder.open(staging.path) as source:
        journal = Journal.of(source, place, manifest)
        journal.refuse_clash(place)
        journal.write(staging.descriptor)
        for above in {(), *(entry.parts[:-1] for entry in journal.entries)}:
            with source.sub(*above) as inner:
                inner.sync()
    return journal


def _commit(staging: Staging, target: Path) -> None:
    """The commit point. Waits for another writer that has committed and is still moving its files."""
    for attempt in range(100):
        try:
            os.rename(staging.path, target / COMMIT)
            return
        except OSError as error:
            if attempt == 99 or error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        recover(target)


def _finish(directory: Path, journal: Journal) -> list[str]:
    """Move the files into place, rename `.commit` in one step, and remove it."""
    try:
        with Folder.open(directory) as target:
            target.sync()
            with target.sub(COMMIT) as commit:
                moved = journal.move(target, commit)
                if not _is_current(target, commit):  # where nothing locks, somebody else may have finished it
                    return moved
                done = new_name(directory)
                target.move(COMMIT, target, done.name)
            target.sync()
    except FileNotFoundError:
        if not os.path.lexists(directory / COMMIT):  # somebody else has finished it
            return []
        raise
    except OSError as error:
        state = f"The new files are complete, but not all in place: an {_interrupted(directory)}"
        raise ArtifactError(f"{directory}: {error}. {state}") from error
    discard(done)
    return moved
