"""The journal of a publish: which files go where. It is written before the commit point, and proves whose it is."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

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


class Entry(NamedTuple):
    parts: tuple[str, ...]
    size: int
    sha256: str

    @property
    def name(self) -> str:
        return "/".join(self.parts)


class Journal(NamedTuple):
    """Files in the order in which they are moved, and the inodes of the two directories, which no copy has."""

    directory: int
    commit: int
    manifest: str
    entries: tuple[Entry, ...]

    @classmethod
    def of(cls, staging: Folder, target: Folder, manifest: str) -> Journal:
        """Of everything in a staging folder. Manifests move last, that of the directory itself at the very end."""
        entries = []
        for parts in _walk(staging):
            if (problem := _bad_name(parts)) is not None:
                raise ArtifactError(f"{staging.path}: {'/'.join(parts)[:200]!r} {problem}. Give adapters plain names.")
            with staging.file(*parts) as descriptor:
                entries.append(Entry(parts, os.fstat(descriptor).st_size, sha256_of(descriptor)))
        entries.sort(key=lambda e: (e.parts[-1] == manifest, -len(e.parts) if e.parts[-1] == manifest else 0, e.parts))
        return cls(target.inode(), staging.inode(), manifest, tuple(entries))

    def write(self, descriptor: int) -> None:
        fields = {"format": FORMAT, "version": VERSION, "directory": self.directory, "commit": self.commit}
        raw = json.dumps(fields | {"manifest": self.manifest, "files": self.entries}).encode()
        if len(raw) > MAX_BYTES or len(self.entries) > MAX_FILES:
            raise ArtifactError(f"{len(self.entries)} files are too many for one save. Save fewer adapters at once.")
        view = memoryview(raw)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)

    @classmethod
    def read(cls, descriptor: int, path: Path) -> Journal:
        """Of an open file that nobody has vetted."""
        os.lseek(descriptor, 0, os.SEEK_SET)
        raw = b""
        while len(raw) <= MAX_BYTES and (block := os.read(descriptor, 1 << 20)):
            raw += block
        fields = parse_json(raw, str(path), MAX_BYTES)
        if fields.get("format") != FORMAT:
            raise _unusable(path, "is no journal of peft_safety")
        if fields.get("version") != VERSION:
            raise ArtifactError(f"{path} is a journal of another version. Use the peft_safety that wrote it.")
        rows, directory, commit = fields.get("files"), fields.get("directory"), fields.get("commit")
        if type(directory) is not int or type(commit) is not int or not is_plain(fields.get("manifest")):
            raise _unusable(path, "names no directory or no manifest")
        if not isinstance(rows, list) or not 0 < len(rows) <= MAX_FILES:
            raise _unusable(path, "names no files, or too many")
        entries = tuple(_entry(row, path) for row in rows)
        if len({entry.name.casefold() for entry in entries}) < len(entries):
            raise _unusable(path, "names a file twice")
        return cls(directory, commit, fields["manifest"], entries)

    def check(self, target: Folder, commit: Folder) -> None:
        """Refuse a publish that was not made here, or has not every file whole in one of the two places."""
        if not self._is_of(target, commit):
            remedy = "Recover the directory that it comes from and copy that again, or remove it and save again."
            raise ArtifactError(f"{commit.path} belongs to another directory: it was copied here. {remedy}")
        for parts in sorted(set(_walk(commit)) - {entry.parts for entry in self.entries}):
            name = "/".join(parts)[:200]
            raise ArtifactError(f"{commit.path} holds {name!r}, which its journal does not name. Remove it.")
        for entry in self.entries:
            if not _holds(target if commit.stat(*entry.parts) is None else commit, entry):
                problem = f"{entry.name} is missing or not the file that was saved"
                raise ArtifactError(f"{commit.path} is not complete: {problem}. Remove it and save the adapter again.")
        self.refuse_clash(target)

    def refuse_clash(self, target: Folder) -> None:
        """Refuse to replace a directory by a file or a file by a directory, and directories that are links."""
        for entry in self.entries:
            for depth in range(1, len(entry.parts) + 1):
                status, is_file = target.stat(*entry.parts[:depth]), depth == len(entry.parts)
                if status is None:
                    break
                if is_directory(status) == is_file:
                    place = target.path.joinpath(*entry.parts[:depth])
                    raise FileExistsError(f"{place} is {what(status)} and is in the way")

    def state(self, target: Folder, commit: Folder) -> str:
        """`old` (no file was moved yet), `new` (all were moved) or `mixed`."""
        waiting = sum(commit.stat(*entry.parts) is not None for entry in self.entries)
        if waiting == len(self.entries):
            return "old"
        own = self._is_of(target, commit)  # a stranger's files are not hashed
        return "new" if waiting == 0 and own and all(_holds(target, entry) for entry in self.entries) else "mixed"

    def move(self, target: Folder, commit: Folder) -> list[str]:
        """Put every file in its place; returns those that were moved. What somebody else has moved is fine."""
        moved = []
        for entry in self.entries:
            *above, name = entry.parts
            if commit.stat(*entry.parts) is None:
                continue
            with target.sub(*above, create=True) as place, commit.sub(*above) as source:
                try:
                    source.move(name, place, name)
                except FileNotFoundError:
                    continue
                if above:
                    place.sync()
            moved.append(entry.name)
        target.sync()
        return moved

    def _is_of(self, target: Folder, commit: Folder) -> bool:
        return (self.directory, self.commit) == (target.inode(), commit.inode())


def _unusable(path: Path, problem: str) -> ArtifactError:
    return ArtifactError(f"{path} {problem}. Remove the directory that it is in, and save again.")


def _entry(row: Any, path: Path) -> Entry:
    parts, size, digest = row if isinstance(row, list) and len(row) == 3 else (None, None, None)
    if not isinstance(parts, list) or type(size) is not int or not isinstance(digest, str):
        raise _unusable(path, "is a broken journal")
    if (problem := _bad_name(tuple(parts))) is not None:
        raise _unusable(path, f"names {str(parts)[:200]}, which {problem}")
    return Entry(tuple(parts), size, digest)


def _bad_name(parts: tuple[Any, ...]) -> str | None:
    if not 0 < len(parts) <= MAX_DEPTH:
        return f"is more than {MAX_DEPTH} levels deep"
    if not all(is_plain(part) for part in parts):
        return "is not a plain name"
    first = parts[0].casefold()
    return "is a reserved name" if first in (NAME, COMMIT) or first.startswith(STAGING) else None


def _walk(folder: Folder, above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
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
    status = place.stat(*entry.parts)
    if status is None or (stat.S_ISREG(status.st_mode) and status.st_size != entry.size):
        return False
    with place.file(*entry.parts) as descriptor:
        return sha256_of(descriptor) == entry.sha256
