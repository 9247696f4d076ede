"""Files that may come from strangers, and saves that may be killed: limits, hashes, bounded JSON, safe names, atomic publishing.

A directory is published in four steps: write and sync everything in a hidden staging folder inside it, rename that folder to `.commit` (the commit point, one
rename), move its files into place with the manifest last, remove it. Whoever reads the directory calls `recover` first, which finishes a publish that was
cut off after its commit point; one that was cut off before it left the old files untouched.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import stat
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from peft_safety.errors import ArtifactError

MAX_JSON_BYTES = 1 << 20
MAX_JSON_DEPTH = 16
MAX_TENSORS = 100_000
MAX_NAME_BYTES = 255
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")

COMMIT = ".commit"
STAGING = ".staging-"


def child(directory: Path, name: str) -> Path:
    """A file of `directory`, by the base name that an artifact gives.

    Raises:
        ArtifactError: the name has a separator, a control character or is special, or the file is a link that leaves the directory (links of the hub's
            cache are fine).
    """
    if not _plain(name):
        raise ArtifactError(f"{directory}: {name!r} is not a plain file name. An artifact may only name files beside its adapter_config.json.")
    path = directory / name
    if path.is_symlink():
        real = Path(os.path.realpath(path))  # unlike resolve(), it lets a loop pass, which is then no file
        if not any(real.is_relative_to(root) for root in (directory.resolve(), *_blobs(directory))):
            raise ArtifactError(f"{path} is a symbolic link that leaves its directory. Replace it by the file itself.")
    return path


def _plain(name: Any) -> bool:
    if not isinstance(name, str) or name in ("", ".", "..") or not name.isprintable() or any(c in name for c in "/\\"):
        return False
    try:
        return len(name.encode()) <= MAX_NAME_BYTES
    except UnicodeEncodeError:  # a lone surrogate
        return False


def _blobs(directory: Path) -> list[Path]:
    """Where the hub's cache keeps the files that a snapshot links to: `<repo>/blobs` of `<repo>/snapshots/<revision>`, whatever the cache's directory."""
    return [(p.parent / "blobs").resolve() for p in directory.absolute().parents if p.name == "snapshots"]


def sha256(path: Path) -> str:
    """Hex digest of a file, read in one streamed pass.

    Raises:
        ArtifactError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}. Copy the whole directory, or make it readable.") from error


def _digest(file: Any) -> str:  # Python 3.10
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """A JSON object from a file nobody has vetted: at most `limit` bytes, 16 levels deep, no duplicate key, no NaN or Infinity.

    Raises:
        ArtifactError: any of these, or the file is missing or not JSON.
    """
    if path.exists() and not path.is_file():  # opening a named pipe would wait forever
        raise ArtifactError(f"{path} is not a regular file. Point at a directory that save_pretrained wrote.")
    try:
        with path.open("rb") as file:
            raw = file.read(limit + 1)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}. Point at a directory that holds it.") from error
    return parse_json(raw, str(path), limit)


def parse_json(raw: bytes | str, where: str, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """`read_json` for text that is already in memory."""
    if len(raw) > limit:
        raise ArtifactError(f"{where} is larger than {limit} bytes, the limit for a config. Copy or save the adapter again.")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            repeated = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise ArtifactError(f"{where}: {repeated[:80]!r} is a duplicate key. Keep one value per key.")
        return found

    def finite(number: str) -> float:
        value = float(number)
        if not math.isfinite(value):  # 1e999, and the literals NaN, Infinity, -Infinity
            raise ArtifactError(f"{where}: {number[:80]} is not a number a config may hold. Use a finite one.")
        return value

    try:
        value = json.loads(raw, object_pairs_hook=unique, parse_constant=finite, parse_float=finite)
    except (ValueError, RecursionError) as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(f"{where} is not valid JSON ({str(error)[:200]}). Copy or save it again.") from error
    if not isinstance(value, dict) or _depth(value) > MAX_JSON_DEPTH:
        raise ArtifactError(f"{where} must be one JSON object, at most {MAX_JSON_DEPTH} levels deep. Save it again with peft_safety.")
    return value


def _depth(value: Any, level: int = 1) -> int:
    """Levels of objects and lists, counted no further than one too many."""
    if not isinstance(value, (dict, list)):
        return level - 1
    if level > MAX_JSON_DEPTH:
        return level
    return max((_depth(v, level + 1) for v in (value.values() if isinstance(value, dict) else value)), default=level)


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file; its header has been checked against its size, and nothing is read yet.

    Raises:
        ArtifactError: missing, truncated, not safetensors, a pickle, or an absurd number of tensors.
    """
    if path.suffix in PICKLES:
        raise ArtifactError(f"{path} is a pickle and is never opened: it can run code. Convert it to safetensors on a machine you can lose.")
    try:
        with safe_open(str(path), framework="pt") as handle:
            count = len(handle.keys())
            if count > MAX_TENSORS:
                raise ArtifactError(f"{path} holds {count} tensors, more than {MAX_TENSORS}. It is no adapter or subspace.")
            yield handle
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} is missing. Copy the whole directory, or load from the place it was saved to.") from error
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} is not a complete safetensors file ({error}). Copy or save it again.") from error


@contextmanager
def publishing(target: Path, manifest: str) -> Iterator[Path]:
    """Write a set of files into `target` so that a reader sees the old set or the new one, wherever the writer dies.

    Yields:
        A staging directory. What it holds when the block ends, sub-directories of further adapters included, becomes part of `target`.

    Raises:
        ArtifactError: the directory cannot be written. Nothing in it has changed then.
    """
    staging: Path | None = None
    try:
        target.mkdir(parents=True, exist_ok=True)
        recover(target, manifest)
        _sweep(target)
        staging = Path(tempfile.mkdtemp(prefix=f"{STAGING}{os.getpid()}-", dir=target))
        mode = usual_mode(staging / "mode")
        yield staging
        for path in (*staging.rglob("*"), staging):
            _refuse_clash(path, target / path.relative_to(staging))
            if path.is_file():
                path.chmod(mode)
            _sync(path)
        staging.rename(target / COMMIT)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(
            f"{target} could not be written: {error}. The files that were there are unchanged; free space or choose another directory."
        ) from error
    finally:
        if staging is not None and staging.exists():
            shutil.rmtree(staging, ignore_errors=True)
    recover(target, manifest)


def usual_mode(probe: Path) -> int:
    """The permissions that a new file gets here; safetensors gives its files to the owner alone. `probe` is created and removed."""
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    return mode


def recover(target: Path, manifest: str) -> None:
    """Finish a publish that died after its commit point, of this directory or, for a further adapter's sub-directory, of the one above.

    Does nothing where there is none. Readers and the writer may do this at the same time.

    Raises:
        ArtifactError: there is one to finish, but the directory cannot be written, or it is a link.
    """
    above = target.resolve().parent
    for owner, pending in ((target, target / COMMIT), (above, above / COMMIT / target.resolve().name)):
        commit = owner / COMMIT
        if commit.is_symlink() and pending.exists():
            raise ArtifactError(f"{commit} is a symbolic link; a save never leaves one. Remove it.")
        if not pending.is_dir():
            continue
        try:
            _sync(owner)
            _move(commit, owner, manifest)
            _sync(owner)
        except OSError as error:
            raise ArtifactError(
                f"{owner} holds a save that was cut off, and it cannot be finished here ({error}). Make the directory writable once."
            ) from error


def _refuse_clash(path: Path, place: Path) -> None:
    """A file cannot take the place of a directory, nor the other way round: find out before the commit point."""
    if place.exists() and place.is_dir() != path.is_dir():
        raise FileExistsError(f"{place} is {'a directory' if place.is_dir() else 'a file'} and is in the way")


def _move(source: Path, target: Path, manifest: str) -> None:
    """Move every entry of a folder into another one, the manifest last, and remove the folder. What somebody else has moved already is fine."""
    with suppress(FileNotFoundError):
        for path in sorted(source.iterdir(), key=lambda p: (p.name == manifest, p.name)):
            place = target / path.name
            if path.is_dir() and place.is_dir() and not path.is_symlink():
                _move(path, place, manifest)
                continue
            with suppress(FileNotFoundError):
                os.replace(path, place)
        source.rmdir()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sweep(target: Path) -> None:
    """Remove staging folders whose process is gone."""
    for path in target.glob(f"{STAGING}*"):
        pid = path.name.removeprefix(STAGING).partition("-")[0]
        if pid.isascii() and pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
