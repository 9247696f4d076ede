"""Reading files that nobody has vetted: size limits, hashes, bounded JSON, safe names. And writing one file whole."""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError, safe_open

from peft_safety.errors import ArtifactError

MAX_JSON_BYTES = 1 << 20
MAX_LISTING_BYTES = 1 << 24
"""For JSON that names every module: enough for 50,000 of them."""
MAX_JSON_DEPTH = 16
MAX_TENSORS = 100_000
MAX_NAME_BYTES = 255
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


def child(directory: Path, name: str) -> Path:
    """A file of `directory`, by the base name that an artifact gives. Refused are separators, control characters,
    special names, and links that leave the directory (links of the Hub's cache are fine).
    """
    if not is_plain(name):
        raise ArtifactError(f"{directory}: {name!r} is not a plain file name. Save the artifact again.")
    path = directory / name
    if path.is_symlink():
        real = Path(os.path.realpath(path))  # unlike resolve(), it lets a loop pass, which is then no file
        snapshots = (parent for parent in directory.absolute().parents if parent.name == "snapshots")
        blobs = [(parent.parent / "blobs").resolve() for parent in snapshots]  # where a Hub cache keeps the content
        if not any(real.is_relative_to(root) for root in (directory.resolve(), *blobs)):
            raise ArtifactError(f"{path} is a symbolic link that leaves its directory. Replace it by the file itself.")
    return path


def is_plain(name: Any) -> bool:
    if not isinstance(name, str) or name in ("", ".", "..") or not name.isprintable() or any(c in name for c in "/\\"):
        return False
    try:
        return len(name.encode()) <= MAX_NAME_BYTES
    except UnicodeEncodeError:  # a lone surrogate
        return False


def sha256(path: Path) -> str:
    try:
        with regular(path) as file:
            return sha256_of(file.fileno())
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}. Copy the whole directory again.") from error


def sha256_of(descriptor: int) -> str:
    """Hex digest of an open file, from its start."""
    digest = hashlib.sha256()
    os.lseek(descriptor, 0, os.SEEK_SET)
    while block := os.read(descriptor, 1 << 20):
        digest.update(block)
    return digest.hexdigest()


def drop(path: Path) -> None:
    """Remove a file of a directory that was saved anew, if it is there. An ArtifactError says that it stays."""
    if not os.path.lexists(path):
        return
    try:
        path.unlink()
    except OSError as error:
        raise ArtifactError(f"{path} is of an older adapter and cannot be removed: {error}. Remove it.") from error


def read_json(path: Path, limit: int = MAX_JSON_BYTES, *, any_number: bool = False) -> dict[str, Any]:
    """A JSON object of at most `limit` bytes and 16 levels, without duplicate keys; else an ArtifactError. NaN and
    Infinity, which Python writes for them, are allowed with `any_number` only.
    """
    return parse_json(read_bytes(path, limit), str(path), limit, any_number=any_number)


def read_bytes(path: Path, limit: int) -> bytes:
    """The content of a regular file; of a larger one than `limit`, one byte more."""
    try:
        with regular(path) as file:
            return file.read(limit + 1)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}. Point at a directory that holds it.") from error


@contextmanager
def regular(path: Path) -> Iterator[IO[bytes]]:
    """Open a file. An ArtifactError refuses a named pipe or a device, whose opening could wait for ever."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ArtifactError(f"{path} is not a regular file. Point at a directory that save_pretrained wrote.")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            yield file
    finally:
        os.close(descriptor)


def parse_json(
    raw: bytes | str, where: str, limit: int = MAX_JSON_BYTES, *, any_number: bool = False
) -> dict[str, Any]:
    """`read_json` for text that is already in memory."""
    if len(raw) > limit:
        raise ArtifactError(f"{where} is larger than {limit} bytes, the limit for a config. Copy or save it again.")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            repeated = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise ArtifactError(f"{where}: {repeated[:80]!r} is a duplicate key. Keep one value per key.")
        return result

    def finite(number: str) -> float:
        value = float(number)
        if not any_number and not math.isfinite(value):  # 1e999, and the literals NaN, Infinity, -Infinity
            raise ArtifactError(f"{where}: {number[:80]} is not a number a config may hold. Use a finite one.")
        return value

    try:
        text = raw if isinstance(raw, str) else raw.decode("utf-8-sig")  # json would guess UTF-16, PEFT does not
        value = json.loads(text, object_pairs_hook=unique, parse_constant=finite, parse_float=finite)
        json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate could not be written again
    except ArtifactError:
        raise
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{where} is not valid JSON ({str(error)[:200]}). Copy or save it again.") from error
    if not isinstance(value, dict) or _depth(value) > MAX_JSON_DEPTH:
        raise ArtifactError(f"{where} must be one JSON object, at most {MAX_JSON_DEPTH} levels deep. Save it again.")
    return value


def _depth(value: Any, level: int = 1) -> int:
    if not isinstance(value, (dict, list)):
        return level - 1
    if level > MAX_JSON_DEPTH:
        return level
    return max((_depth(v, level + 1) for v in (value.values() if isinstance(value, dict) else value)), default=level)


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file, of which no tensor is read yet. An ArtifactError refuses what is missing, truncated,
    too many tensors, or another kind of file (pickles are never opened).
    """
    if path.suffix in PICKLES:
        raise ArtifactError(f"{path} is a pickle, which can run code: it is never opened. Convert it to safetensors.")
    try:
        with regular(path), safe_open(str(path), framework="pt") as handle:
            count = len(handle.keys())
            if count > MAX_TENSORS:
                raise ArtifactError(f"{path} holds {count} tensors, more than {MAX_TENSORS}. Give an adapter's file.")
            yield handle
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} is missing. Copy the whole directory.") from error
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} is not a complete safetensors file ({error}). Copy or save it again.") from error


def check_place(file: Path) -> None:
    """Before the work: an ArtifactError where a file cannot be written. Its directory need not be there yet."""
    found = next((path for path in file.absolute().parents if os.path.lexists(path)), file)
    problem = "it is a directory" if os.path.isdir(file) else ""
    if not found.is_dir():
        problem = f"{found} is not a directory"
    elif not os.access(found, os.W_OK | os.X_OK):
        problem = f"{found} is not writable"
    if problem:
        raise ArtifactError(f"{file} cannot be written: {problem}. Give another place.")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write the file that is yielded: it takes the place of `path` by one rename, synced and with the usual
    permissions. An ArtifactError says that it could not be written, and that nothing has changed.
    """
    staged = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")  # threads share the number
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staged.touch()
        mode = stat.S_IMODE(staged.stat().st_mode)  # safetensors gives its files to the owner alone
        yield staged
        with staged.open("rb") as file:
            os.fsync(file.fileno())
        staged.chmod(mode)
        os.replace(staged, path)
    except (OSError, SafetensorError) as error:
        remedy = "Nothing has changed; use another place, or free space."
        raise ArtifactError(f"{path} could not be written: {error}. {remedy}") from error
    finally:
        with suppress(OSError):
            staged.unlink(missing_ok=True)
