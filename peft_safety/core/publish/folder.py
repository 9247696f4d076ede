"""A directory that is accessed by its file descriptor, so that no link inside it can lead out of it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peft_safety.errors import ArtifactError

BY_DESCRIPTOR = hasattr(os, "O_NOFOLLOW") and {os.open, os.stat, os.mkdir, os.rename} <= os.supports_dir_fd
"""Whether paths are resolved relative to an open directory. Windows cannot do this: there, every step checks with
`lstat` and refuses links, but a directory that is replaced by a link between the check and the use is not detected."""

_DIRECTORY = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_NOFOLLOW", 0)
_FILE = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


class Folder:
    """Names given to its methods are plain names: of this directory, or (several) one below the other."""

    def __init__(self, path: Path, descriptor: int | None) -> None:
        self.path, self.descriptor = path, descriptor

    @classmethod
    @contextmanager
    def open(cls, path: Path) -> Iterator[Folder]:
        """The directory that the user named: a link to it is followed, none below it is."""
        descriptor = os.open(path, _DIRECTORY & ~os.O_NOFOLLOW) if BY_DESCRIPTOR else None
        with closing(descriptor):
            yield cls(path, descriptor)

    @contextmanager
    def sub(self, *names: str, create: bool = False) -> Iterator[Folder]:
        """A directory below; without names, this one. A link is refused; what is missing is a FileNotFoundError."""
        if not names:
            yield self
            return
        name, *rest = names
        path, status = self.path / name, self.stat(name)
        if status is None and create:
            os.mkdir(self._name(name), dir_fd=self.descriptor)
        elif status is None:
            raise FileNotFoundError(f"{path} is missing")
        elif not is_directory(status):
            raise ArtifactError(f"{path} is {what(status)}, not a directory. Remove it, or save elsewhere.")
        descriptor = None if self.descriptor is None else os.open(name, _DIRECTORY, dir_fd=self.descriptor)
        with closing(descriptor), Folder(path, descriptor).sub(*rest, create=create) as folder:
            yield folder

    def stat(self, *names: str) -> os.stat_result | None:
        """The status of the name itself, not of the target of a link; None if it does not exist."""
        try:
            with self.sub(*names[:-1]) as folder:
                return os.stat(folder._name(names[-1]), dir_fd=folder.descriptor, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def inode(self) -> int:
        return os.stat(self.path if self.descriptor is None else self.descriptor).st_ino

    def names(self) -> list[str]:
        return sorted(os.listdir(self.path if self.descriptor is None else self.descriptor))

    @contextmanager
    def file(self, *names: str, write: bool = False) -> Iterator[int]:
        """Descriptor of a regular file. Links, devices, pipes and files with a second name are refused."""
        with self.sub(*names[:-1]) as folder:
            path, status = folder.path / names[-1], folder.stat(names[-1])
            if status is None:
                raise FileNotFoundError(f"{path} is missing")
            _require_one_file(path, status)
            flags = _FILE | (os.O_RDWR if write else os.O_RDONLY)
            descriptor = os.open(folder._name(names[-1]), flags, dir_fd=folder.descriptor)
            with closing(descriptor):
                _require_one_file(path, os.fstat(descriptor))
                yield descriptor

    def move(self, name: str, other: Folder, new: str) -> None:
        if self.descriptor is None:
            os.replace(self._name(name), other._name(new))
        else:
            os.rename(name, new, src_dir_fd=self.descriptor, dst_dir_fd=other.descriptor)

    def sync(self) -> None:
        """Flush the directory entries to the disk. Windows has no call for this."""
        if self.descriptor is not None:
            os.fsync(self.descriptor)

    def _name(self, name: str) -> str:
        return name if self.descriptor is not None else str(self.path / name)


@contextmanager
def closing(descriptor: int | None) -> Iterator[None]:
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def is_directory(status: os.stat_result) -> bool:
    """Whether this is a directory, and not a Windows junction, which `lstat` reports as a directory."""
    return stat.S_ISDIR(status.st_mode) and not _junction(status)


def _junction(status: os.stat_result) -> bool:
    return bool(getattr(status, "st_reparse_tag", None))


def what(status: os.stat_result) -> str:
    if stat.S_ISLNK(status.st_mode) or _junction(status):
        return "a symbolic link"
    if stat.S_ISDIR(status.st_mode):
        return "a directory"
    return "a file" if stat.S_ISREG(status.st_mode) else "a device or a pipe"


def _require_one_file(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise ArtifactError(f"{path} is {what(status)}, where a save has a file. Remove it, or save elsewhere.")
    if status.st_nlink > 1:
        raise ArtifactError(f"{path} is a hard link: the file has another name elsewhere. Replace it by a copy.")
