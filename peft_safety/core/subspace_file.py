"""The file of a safety subspace: plain safetensors.

`basis.out.<module>` `(m, k)` and `basis.in.<module>` `(n, k)` have orthonormal columns, `spectrum.*` the singular
values, `fingerprint.<module>` samples of the base weights. The header holds the format's name with the provenance as
JSON. A tensor that several modules share is stored once, and the header says who shares whose.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from peft_safety.core import files
from peft_safety.core.projection import SIDES, Side
from peft_safety.errors import ArtifactError, SubspaceError

FILE_NAME = "safety_subspace.safetensors"
FORMAT = "peft_safety.core.subspace.v1"
SHARED = "shared"
"""Key of the provenance in a file's header that maps the names of tensors that are not stored to those they equal."""
Bases = dict[str, dict[Side, Tensor]]


def write(path: Path, tensors: Mapping[str, Tensor], provenance: Mapping[str, Any]) -> Path:
    """Write the file, atomically; into `path/safety_subspace.safetensors` when `path` has no such suffix.

    Raises:
        ArtifactError: it cannot be written; what was there is unchanged.
        SubspaceError: provenance that is no JSON.
    """
    if path.suffix != ".safetensors":
        path = path / FILE_NAME
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    first: dict[int, str] = {}
    shared = {key: first[id(x)] for key, x in tensors.items() if first.setdefault(id(x), key) != key}
    try:
        facts = json.dumps({**provenance, **({SHARED: shared} if shared else {})}, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise SubspaceError(f"{path}: the provenance is no JSON ({error}). Use text and finite numbers.") from error
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        mode = files.usual_mode(staged)
        stored = {key: x for key, x in tensors.items() if key not in shared}
        save_file(stored, staged, metadata={FORMAT: facts})  # one entry: safetensors shuffles several
        with staged.open("rb") as file:
            os.fsync(file.fileno())
        staged.chmod(mode)
        os.replace(staged, path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(
            f"{path} could not be written: {error}. Free space or choose another directory."
        ) from error
    finally:
        with suppress(OSError):
            staged.unlink(missing_ok=True)
    return path


def read(path: Path) -> tuple[Bases, Bases, dict[str, Tensor], dict[str, Any]]:
    """Bases and spectra by module and side, fingerprints by module, and the provenance.

    Raises:
        SubspaceError: its content is malformed. ArtifactError: not a readable safetensors file.
    """
    with files.open_tensors(path) as handle:
        return _parse(handle, path)


def _parse(handle: Any, path: Path) -> tuple[Bases, Bases, dict[str, Tensor], dict[str, Any]]:
    metadata = handle.metadata() or {}
    if FORMAT not in metadata:
        raise SubspaceError(
            f"{path} is not a safety subspace (its header has {str(sorted(metadata))[:80]}, not {FORMAT!r}). Write it "
            "with SafetySubspace.save."
        )
    provenance = files.parse_json(metadata[FORMAT], f"{path} (header)")
    bases: Bases = {}
    spectra: Bases = {}
    fingerprints: dict[str, Tensor] = {}
    stored = {}
    for key in handle.keys():  # noqa: SIM118  a safetensors handle is no mapping
        dtype = handle.get_slice(key).get_dtype()
        if dtype != "F32":
            raise SubspaceError(
                f"{path}: tensor {key!r} is {dtype}; a subspace is stored as F32. Save it again with "
                "SafetySubspace.save."
            )
        stored[key] = handle.get_tensor(key)
    shared = provenance.pop(SHARED, {})
    if not isinstance(shared, dict) or not all(
        isinstance(of, str) and of in stored and key not in stored for key, of in shared.items()
    ):
        raise SubspaceError(
            f"{path}: its header says that tensors are shared which are not there. Save it again with "
            "SafetySubspace.save."
        )
    for key, value in (stored | {key: stored[of] for key, of in shared.items()}).items():
        kind, _, rest = key.partition(".")
        side, _, name = rest.partition(".")
        if kind == "fingerprint":
            fingerprints[rest] = value
        elif kind in ("basis", "spectrum") and side in SIDES and name:
            (bases if kind == "basis" else spectra).setdefault(name, {})[side] = value
        else:
            raise SubspaceError(f"{path}: unknown tensor {key!r}. The file was not written by SafetySubspace.save.")
    return bases, spectra, fingerprints, provenance


def locate(source: str | os.PathLike[str], **hub: Any) -> Path:
    """The file of a path, of a directory that holds one, or of a Hub repository.

    Raises:
        SubspaceError: nothing there.
    """
    path = Path(source)
    if path.is_dir():
        return files.child(path, FILE_NAME)
    return path if path.exists() else _download(os.fspath(source), **hub)


def _download(repo: str, **hub: Any) -> Path:
    if (
        repo.count("/") > 1 or repo.startswith((".", "/", "~")) or repo.endswith(".safetensors")
    ):  # a path, not a repository: don't ask the network
        raise SubspaceError(f"{repo!r} does not exist. Check the spelling, or calibrate a subspace.")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repo, FILE_NAME, **hub))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise SubspaceError(
            f"{repo!r} is neither a file, nor a directory with {FILE_NAME}, nor a Hub repository in reach "
            f"({type(error).__name__}). "
            "Check the spelling, or calibrate one."
        ) from error
