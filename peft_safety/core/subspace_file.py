"""The file of a safety subspace: plain safetensors.

`basis.out.<module>` `(m, k)` and `basis.in.<module>` `(n, k)` have orthonormal columns, in fp32, or rounded to fp16 or
bf16; `basis.in.<module>` `(k,)` in int64 are tokens of an embedding. Then `spectrum.*` and `fingerprint.<module>`. The
header holds the format's name with the provenance as JSON, and says which tensors are shared: they are stored once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from peft_safety.core import files
from peft_safety.core.names import listed
from peft_safety.core.projection import SIDES, Side
from peft_safety.errors import SubspaceError

FILE_NAME = "safety_subspace.safetensors"
FORMAT = "peft_safety.subspace.v1"
SHARED = "shared"
"""Key of the provenance in a file's header that maps the names of tensors that are not stored to those they equal."""
DTYPES = {"basis": ("F32", "F16", "BF16", "I64"), "spectrum": ("F32",), "fingerprint": ("F32",)}
Bases = dict[str, dict[Side, Tensor]]


def file_of(path: Path) -> Path:
    """The file that is written: `path/safety_subspace.safetensors` where `path` has no such suffix."""
    return path if path.suffix == ".safetensors" else path / FILE_NAME


def write(path: Path, tensors: Mapping[str, Tensor], provenance: Mapping[str, Any]) -> Path:
    """Write the file, atomically; see `file_of`."""
    path = file_of(path)
    first: dict[int, str] = {}
    shared = {key: first[id(x)] for key, x in tensors.items() if first.setdefault(id(x), key) != key}
    try:
        facts = json.dumps({**provenance, **({SHARED: shared} if shared else {})}, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise SubspaceError(f"{path}: the provenance is no JSON ({error}). Use text and finite numbers.") from error
    stored = {key: x for key, x in tensors.items() if key not in shared}
    with files.replacing(path) as staged:
        save_file(stored, staged, metadata={FORMAT: facts})  # one entry: safetensors shuffles several
    return path


def read(
    path: Path, modules: Collection[str] | None = None, rank: int | None = None
) -> tuple[Bases, Bases, dict[str, Tensor], dict[str, Any]]:
    """Bases, spectra, fingerprints and provenance; see `SafetySubspace.load`. What is not asked for is not read."""
    bases: Bases = {}
    spectra: Bases = {}
    fingerprints: dict[str, Tensor] = {}
    tensors: dict[str, Tensor] = {}
    known = set()
    with files.open_tensors(path) as handle:
        header = handle.metadata() or {}
        if FORMAT not in header:
            raise SubspaceError(
                f"{path} is no safety subspace: its header has {str(sorted(header))[:80]}, not {FORMAT!r}. Write it "
                "with SafetySubspace.save."
            )
        provenance = files.parse_json(header[FORMAT], f"{path} (header)", files.MAX_LISTING_BYTES)
        stored = {key: key for key in handle.keys()}  # noqa: SIM118  a safetensors handle is no mapping
        shared = provenance.pop(SHARED, {})
        if not isinstance(shared, dict) or not all(
            isinstance(of, str) and of in stored and key not in stored for key, of in shared.items()
        ):
            raise SubspaceError(f"{path}: its header names shared tensors that it does not hold. Save it again.")
        for key, of in (stored | shared).items():
            kind, _, rest = key.partition(".")
            side, _, name = rest.partition(".")
            if kind == "fingerprint":
                name = rest
            elif kind not in DTYPES or side not in SIDES or not name:
                raise SubspaceError(f"{path}: unknown tensor {key!r}. Save it again with SafetySubspace.save.")
            known.add(name)
            if modules is not None and name not in modules:
                continue
            part = handle.get_slice(of)
            dtype, tokens = part.get_dtype(), len(part.get_shape()) == 1 and kind == "basis"
            if dtype not in DTYPES[kind] or tokens != (dtype == "I64"):
                what = f"{of!r} {tuple(part.get_shape())} is {dtype}"
                raise SubspaceError(f"{path}: {what}, not {' or '.join(DTYPES[kind])}. Save it again.")
            if of not in tensors:
                tensors[of] = _leading(handle, of, None if kind == "fingerprint" else rank)
            if kind == "fingerprint":
                fingerprints[name] = tensors[of]
            else:
                (bases if kind == "basis" else spectra).setdefault(name, {})[side] = tensors[of]
    if modules is not None and not bases:
        raise SubspaceError(
            f"{path}: no basis for {listed(modules)} (it has {listed(known)}). Calibrate with the same target_modules."
        )
    if rank is not None:
        provenance.pop("covered", None)  # by the whole bases
    return bases, spectra, fingerprints, provenance


def _leading(handle: Any, key: str, rank: int | None) -> Tensor:
    part = handle.get_slice(key)
    last = part.get_shape()[-1:]
    whole: Tensor = handle.get_tensor(key) if rank is None or not last or last[0] <= rank else part[..., :rank]
    return whole


def locate(source: str | os.PathLike[str], **hub: Any) -> Path:
    """The file of a path, of a directory that holds one, or of a Hub repository, from which it is fetched."""
    path, repository = Path(source), os.fspath(source)
    if path.is_dir():
        return files.child(path, FILE_NAME)
    if path.exists():
        return path
    looks_like_a_path = repository.count("/") > 1 or repository.startswith((".", "/", "~"))
    if looks_like_a_path or repository.endswith(".safetensors"):
        raise SubspaceError(f"{repository!r} does not exist. Check the spelling, or calibrate a subspace.")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, FILE_NAME, **hub))
    except (OSError, ValueError) as error:  # the Hub's errors are among them
        raise SubspaceError(
            f"{repository!r} is no file, no directory with {FILE_NAME} and no Hub repository in reach "
            f"({type(error).__name__}). Check the spelling, or calibrate a subspace."
        ) from error
