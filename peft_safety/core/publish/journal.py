"""The journal of a publish: which files it puts into which directory.

It is written before the commit point and proves whose `.commit` that is.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_safety.core.files import is_plain, parse_json, sha256_of
from peft_safety.core.publish.folder import Folder, is_directory, what
from peft_safety.errors import ArtifactError

NAME = ".publish.json"
COMMIT = ".commit"
STAGING = ".staging-"
FORMAT, VERSION = "peft-safety publish", 1
MAX_BYTES = 4 << 20
MAX_FILES = 10_000
MAX_DEPTH = 4


@dataclass(frozen=True)
class Entry:
    """One file of a publish."""

    parts: tuple[str, ...]
    size: int
    sha256: str

    @property
    def name(self) -> str:
        """The path, for messages."""
        return "/".join(self.parts)


@dataclass(frozen=True)
class Journal:
    """Files in the order in which they are moved, and the inodes of the two directories, which no copy has."""

    directory: int
    commit: int
    manifest: str
    entries: tuple[Entry, ...]

    @classmethod
    def of(cls, staging: Folder, target: Folder, manifest: str) -> Journal:
        """Of everything in a staging folder. Manifests move last, that of the directory itself at the very end.

        Raises:
            ArtifactError: something else than files with plain names.
        """
        entries = []
        for parts in _walk(staging):
            if (problem := _bad_name(parts)) is not None:
                raise ArtifactError(f"{staging.path}: {'/'.join(parts)[:200]!r} {problem}. Give adapters plain names.")
            with staging.reach(parts[:-1]) as folder, folder.file(parts[-1]) as descriptor:
                entries.append(Entry(parts, os.fstat(descriptor).st_size, sha256_of(descriptor)))
        entries.sort(key=lambda e: (e.parts[-1] == manifest, -len(e.parts) if e.parts[-1] == manifest else 0, e.parts))
        return cls(target.inode(), staging.inode(), manifest, tuple(entries))

    def write(self, descriptor: int) -> None:
        """Write the journal to an empty file and flush it to the disk."""
        rows = [[list(entry.parts), entry.size, entry.sha256] for entry in self.entries]
        fields = {"format": FORMAT, "version": VERSION, "directory": self.directory, "commit": self.commit}
        raw = json.dumps(fields | {"manifest": self.manifest, "files": rows}).encode()
        if len(raw) > MAX_BYTES or len(self.entries) > MAX_FILES:
            raise ArtifactError(f"{len(self.entries)} files are too many for one save. Save fewer adapters at once.")
        view = memoryview(raw)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)

    @classmethod
    def read(cls, descriptor: int, path: Path) -> Journal:
        """Of an open file.

        Raises:
            ArtifactError: it is no journal, or one of another version.
        """
        os.lseek(descriptor, 0, os.SEEK_SET)
        raw = b""
        while len(raw) <= MAX_BYTES and (block := os.read(descriptor, 1 << 20)):
            raw += block
        fields = parse_json(raw, str(path), MAX_BYTES)
        if fields.get("format") != FORMAT:
            raise ArtifactError(f"{path} is no journal of peft_safety. Remove the directory that it is in.")
        if fields.get("version") != VERSION:
            raise ArtifactError(f"{path} is a journal of another version. Use the peft_safety that wrote it.")
        rows, directory, commit = fields.get("files"), fields.get("directory"), fields.get("commit")
        if (
            not isinstance(rows, list)
            or not 0 < len(rows) <= MAX_FILES
            or type(directory) is not int
            or type(commit) is not int
        ):
            raise ArtifactError(f"{path} is a broken journal. Remove the directory that it is in, and save again.")
        entries = tuple(_entry(row, path) for row in rows)
        folded = [entry.name.casefold() for entry in entries]
        if len(set(folded)) < len(folded) or not is_plain(fields.get("manifest")):
            raise ArtifactError(f"{path} names a file twice, or no manifest. Remove the directory that it is in.")
        return cls(directory, commit, fields["manifest"], entries)

    def check(self, target: Folder, commit: Folder) -> None:
        """That this publish was made here and can be finished: every file is whole, in one of the two places.

        Raises:
            ArtifactError: why not.
        """
        if (self.directory, self.commit) != (target.inode(), commit.inode()):
            raise ArtifactError(
                f"{commit.path} belongs to another directory: it was copied here. Recover the directory that it comes "
                "from and copy that again, or remove it and save again."
            )
        strangers = set(_walk(commit)) - {entry.parts for entry in self.entries}
        if strangers:
            raise ArtifactError(
                f"{commit.path} holds {'/'.join(min(strangers))[:200]!r}, which its journal does not name. Remove it."
            )
        for entry in self.entries:
            place = commit if commit.find(entry.parts) is not None else target
            if not _holds(place, entry):
                raise ArtifactError(
                    f"{commit.path} is not complete: {entry.name} is missing or not the file that was saved. Remove "
                    f"{commit.path} and save the adapter again."
                )
        self.refuse_clash(target)

    def refuse_clash(self, target: Folder) -> None:
        """Refuse to replace a directory by a file or a file by a directory, and directories that are links."""
        for entry in self.entries:
            for depth in range(1, len(entry.parts) + 1):
                place, status = target.path.joinpath(*entry.parts[:depth]), target.find(entry.parts[:depth])
                if status is None:
                    break
                last = depth == len(entry.parts)
                if is_directory(status) if last else not is_directory(status):
                    raise FileExistsError(f"{place} is {what(status)} and is in the way")

    def state(self, target: Folder, commit: Folder) -> str:
        """`old` (no file was moved yet), `new` (all were moved) or `mixed`."""
        waiting = sum(commit.find(entry.parts) is not None for entry in self.entries)
        if waiting == len(self.entries):
            return "old"
        own = (self.directory, self.commit) == (target.inode(), commit.inode())  # a stranger's files are not hashed
        return "new" if waiting == 0 and own and all(_holds(target, entry) for entry in self.entries) else "mixed"

    def move(self, target: Folder, commit: Folder) -> list[str]:
        """Put every file in its place. What somebody else has moved meanwhile is fine.

        Returns:
            The files that were still to be moved.
        """
        moved = []
        for entry in self.entries:
            if commit.find(entry.parts) is None:
                continue
            with target.reach(entry.parts[:-1], create=True) as place, commit.reach(entry.parts[:-1]) as source:
                try:
                    source.move(entry.parts[-1], place)
                except FileNotFoundError:
                    continue
                if len(entry.parts) > 1:
                    place.sync()
            moved.append(entry.name)
        target.sync()
        return moved


def _entry(row: Any, path: Path) -> Entry:
    parts, size, digest = row if isinstance(row, list) and len(row) == 3 else (None, None, None)
    if not isinstance(parts, list) or type(size) is not int or not isinstance(digest, str):
        raise ArtifactError(f"{path} is a broken journal. Remove the directory that it is in, and save again.")
    if (problem := _bad_name(tuple(parts))) is not None:
        raise ArtifactError(f"{path}: {str(parts)[:200]} {problem}. Remove the directory that it is in.")
    return Entry(tuple(parts), size, digest)


def _bad_name(parts: tuple[Any, ...]) -> str | None:
    if not 0 < len(parts) <= MAX_DEPTH:
        return f"is more than {MAX_DEPTH} levels deep"
    if not all(is_plain(part) for part in parts):
        return "is not a plain name"
    first = parts[0].casefold()
    return "is a reserved name" if first in (NAME, COMMIT) or first.startswith(STAGING) else None


def _walk(folder: Folder, above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every file below, except the journal."""
    for name in folder.names():
        parts, status = (*above, name), folder.stat(name)
        if status is not None and is_directory(status):
            if len(parts) > MAX_DEPTH:
                raise ArtifactError(f"{folder.path / name} is more than {MAX_DEPTH} levels deep. Remove it.")
            with folder.sub(name) as inner:
                yield from _walk(inner, parts)
        elif status is not None and parts != (NAME,):
            yield parts


def _holds(place: Folder, entry: Entry) -> bool:
    """Whether the file of an entry is there with the recorded size and hash."""
    status = place.find(entry.parts)
    if status is None or (stat.S_ISREG(status.st_mode) and status.st_size != entry.size):
        return False
    with place.reach(entry.parts[:-1]) as folder, folder.file(entry.parts[-1]) as descriptor:
        return sha256_of(descriptor) == entry.sha256
