"""The adapter on disk: what a protected adapter directory must hold, and the check that it does.

`adapter_config.json` is the manifest: it names the other files and their sha256. `adapter_model.safetensors` holds PEFT's plain keys with *projected*
factors. `safety_subspace.safetensors` holds the bases, for exactly the modules of the adapter. Nothing here builds or needs a model.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peft_safety import files
from peft_safety.errors import ArtifactError, ConfigError
from peft_safety.projection import Side, leak, leak_tolerance
from peft_safety.subspace import FILE_NAME as SUBSPACE_FILE
from peft_safety.subspace import SafetySubspace

MANIFEST = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
PROTECTED_TYPES = ("SALORA",)
"""Values of `peft_type` that promise a protected adapter."""

MAX_ALPHA = 1e6
MAX_RANK = 65_536
DTYPES = ("F32", "BF16", "F16")
_PLAIN_NAME = re.compile(r"[\w.\-]+")
_KEY = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.(?P<factor>lora_A|lora_B)\.(?P<kind>weight|initial)")


@dataclass(frozen=True)
class StoredAdapter:
    """A checked adapter directory.

    Attributes:
        config: the JSON of `adapter_config.json`.
        subspace: its bases.
        shapes: `{module: (out_features, in_features, rank)}`.
        residual: whether it has frozen initial factors (`init="task"`).
        leaks: `{module: ||U^T B|| / ||B||}`.
        extra_tensors: keys of other trained tensors, which no projection constrains (`modules_to_save`, resized embeddings).
    """

    directory: Path
    config: dict[str, Any]
    subspace: SafetySubspace
    shapes: dict[str, tuple[int, int, int]]
    residual: bool
    leaks: dict[str, float]
    extra_tensors: tuple[str, ...]

    def comes_from(self, source: str, subfolder: str | None) -> bool:
        """Whether this is what `source` (a directory, or a Hub id) was checked as."""
        local = Path(source, subfolder) if subfolder else Path(source)
        return self.directory.resolve() == local.resolve() if local.is_dir() else source.replace("/", "--") in str(self.directory)


def check_numbers(r: Any, alpha: Any, dropout: Any, where: str) -> None:
    """Refuse ranks and scales that PEFT accepts and that cannot be meant.

    Raises:
        ConfigError: a rank that is not an integer in [1, 65536], an alpha that is not finite and in (0, 1e6], a dropout outside [0, 1).
    """
    if not isinstance(r, int) or isinstance(r, bool) or not 1 <= r <= MAX_RANK:
        raise ConfigError(f"{where}: r={r!r}. A rank is an integer from 1 to {MAX_RANK}.")
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not math.isfinite(alpha) or not 0 < alpha <= MAX_ALPHA:
        raise ConfigError(f"{where}: lora_alpha={alpha!r}. Use a finite number above 0 and at most {MAX_ALPHA:g}.")
    if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise ConfigError(f"{where}: lora_dropout={dropout!r}. Use a number in [0, 1).")


def check_adapter(directory: Path) -> StoredAdapter:
    """Check an adapter directory in full: files, hashes, keys, shapes, finiteness, orthonormality, and that the factors do not leak.

    Raises:
        ArtifactError: anything but the exact set of files and tensors, or a changed byte.
        SubspaceError: bases that would not protect.
    """
    files.recover(directory, MANIFEST)
    config = files.read_json(directory / MANIFEST)
    if config.get("peft_type") not in PROTECTED_TYPES:
        raise ArtifactError(f"{directory}: peft_type {config.get('peft_type')!r} promises no protection. Protected types: {', '.join(PROTECTED_TYPES)}.")
    _refuse_pickles(directory)
    record = _record(directory, config)
    for name, expected in record["files"].items():
        path = files.child(directory, name)
        if not path.is_file():
            raise ArtifactError(f"{path} is missing. Copy the whole directory.")
        if files.sha256(path) != expected:
            raise ArtifactError(f"{path} is not the file that was saved (its sha256 differs from the one in {MANIFEST}). Copy or save it again.")
    subspace = SafetySubspace.load(files.child(directory, record["subspace"]))
    return _check_factors(directory, config, subspace, tuple(record["extra_tensors"]))


def seal(directory: Path) -> None:
    """Complete the manifest of a freshly written directory: the adapter file's hash, and which tensors are not LoRA factors."""
    path = directory / MANIFEST
    config = files.read_json(path)
    record = config["safety_artifact"]
    record["files"][ADAPTER_FILE] = files.sha256(directory / ADAPTER_FILE)
    with files.open_tensors(directory / ADAPTER_FILE) as handle:
        record["extra_tensors"] = sorted(key for key in handle.keys() if _KEY.fullmatch(key) is None)  # noqa: SIM118
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def _record(directory: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The `safety_artifact` entry, its types checked."""
    record = config.get("safety_artifact")
    if not isinstance(record, dict) or not isinstance(record.get("files"), dict) or record.get("subspace") != SUBSPACE_FILE:
        raise ArtifactError(
            f"{directory / MANIFEST}: no complete 'safety_artifact' entry (subspace {SUBSPACE_FILE!r} and the files' hashes). Save the adapter again."
        )
    hashes, extra = record["files"], record.get("extra_tensors", [])
    if SUBSPACE_FILE not in hashes or set(hashes) - {SUBSPACE_FILE, ADAPTER_FILE} or not all(isinstance(h, str) for h in hashes.values()):
        raise ArtifactError(f"{directory / MANIFEST}: 'files' lists {sorted(hashes)}; it must list {SUBSPACE_FILE} and may list {ADAPTER_FILE}.")
    if not isinstance(extra, list) or not all(isinstance(key, str) for key in extra):
        raise ArtifactError(f"{directory / MANIFEST}: 'extra_tensors' must be a list of tensor names.")
    return {"subspace": SUBSPACE_FILE, "files": hashes, "extra_tensors": extra}


def _refuse_pickles(directory: Path) -> None:
    for path in directory.iterdir():
        if path.name.startswith("adapter_model") and path.suffix in files.PICKLES:
            raise ArtifactError(f"{path} is a pickle and is never opened: it can run code. Remove it, or convert it to {ADAPTER_FILE}.")


def _check_factors(directory: Path, config: dict[str, Any], subspace: SafetySubspace, extra: tuple[str, ...]) -> StoredAdapter:
    path = files.child(directory, ADAPTER_FILE)
    factors: dict[str, dict[str, str]] = {}
    others = set()
    with files.open_tensors(path) as handle:
        for key in handle.keys():  # noqa: SIM118
            match = _KEY.fullmatch(key)
            if match is None:
                others.add(key)
            else:
                factors.setdefault(match["module"], {})[f"{match['factor']}.{match['kind']}"] = key
        if others != set(extra):
            raise ArtifactError(f"{path}: unknown or missing tensors {sorted(others ^ set(extra))[:3]}. The file must hold exactly what {MANIFEST} lists.")
        if set(factors) != set(subspace.bases):
            odd = sorted(set(factors) ^ set(subspace.bases))
            raise ArtifactError(
                f"{path}: {len(factors)} modules, but the subspace has {len(subspace.bases)}; they differ at {odd[:3]}. Copy or save the adapter again."
            )
        residual = any("lora_A.initial" in keys for keys in factors.values())
        expected = {"lora_A.weight", "lora_B.weight"} | ({"lora_A.initial", "lora_B.initial"} if residual else set())
        shapes, leaks = {}, {}
        for module, keys in sorted(factors.items()):
            if set(keys) != expected:
                raise ArtifactError(f"{path}: {module} has {sorted(keys)}, expected {sorted(expected)}. Copy or save the adapter again.")
            shapes[module] = _check_shapes(path, module, {k: handle.get_slice(v) for k, v in keys.items()}, subspace, config)
            tensors = {kind: handle.get_tensor(key) for kind, key in keys.items()}
            leaks[module] = _check_values(path, module, tensors, subspace)
        for key in extra:
            if not bool(torch.isfinite(handle.get_tensor(key)).all()):
                raise ArtifactError(f"{path}: {key} holds NaN or Inf. Save the adapter again from the last good checkpoint.")
    return StoredAdapter(directory, config, subspace, shapes, residual, leaks, extra)


def _check_shapes(path: Path, module: str, slices: Mapping[str, Any], subspace: SafetySubspace, config: Mapping[str, Any]) -> tuple[int, int, int]:
    """From the header alone, before anything is allocated: `(out_features, in_features, rank)`."""
    shapes = {kind: tuple(s.get_shape()) for kind, s in slices.items()}
    dtypes = {s.get_dtype() for s in slices.values()}
    a, b = shapes["lora_A.weight"], shapes["lora_B.weight"]
    rank = config.get("rank_pattern", {}).get(module, config.get("r"))
    fits = len(a) == len(b) == 2 and a[0] == b[1] == rank and 1 <= rank <= min(a[1], b[0])
    fits = fits and all(shapes[f"{f}.initial"] == shapes[f"{f}.weight"] for f in ("lora_A", "lora_B") if f"{f}.initial" in shapes)
    for side, d in (("out", b[0] if b else 0), ("in", a[-1] if a else 0)):
        basis = subspace.bases[module].get(side)  # type: ignore[call-overload]
        fits = fits and (basis is None or basis.shape[0] == d)
    if not fits or not dtypes <= set(DTYPES):
        bases = {side: tuple(u.shape) for side, u in subspace.bases[module].items()}
        raise ArtifactError(
            f"{path}: {module} has lora_A {a}, lora_B {b} of {sorted(dtypes)}, which do not fit rank {rank} and bases {bases}. Save the adapter again."
        )
    return int(b[0]), int(a[1]), int(rank)


def _check_values(path: Path, module: str, tensors: Mapping[str, Tensor], subspace: SafetySubspace) -> float:
    for kind, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ArtifactError(f"{path}: {module}.{kind} {tuple(tensor.shape)} holds NaN or Inf. Save the adapter again from the last good checkpoint.")
    worst = 0.0
    for side, u in subspace.bases[module].items():
        factor = "lora_B" if side == "out" else "lora_A"
        for kind in ("weight", "initial"):
            if f"{factor}.{kind}" in tensors:
                worst = max(worst, _leak(path, module, f"{factor}.{kind}", u, tensors[f"{factor}.{kind}"], side))
    return worst


def _leak(path: Path, module: str, kind: str, u: Tensor, tensor: Tensor, side: Side) -> float:
    found = leak(u, tensor, side)
    if not found <= leak_tolerance(tensor.dtype):
        raise ArtifactError(
            f"{path}: {module}.{kind} {tuple(tensor.shape)} reaches {found:.2g} of its norm into the protected subspace (limit {leak_tolerance(tensor.dtype):.2g}). "
            "It is not a protected adapter of this subspace; train or save it again."
        )
    return found


def plain_patterns(config: Mapping[str, Any], directory: Path) -> None:
    """Refuse regular expressions in a stored config: a stranger's can take forever to match. This package saves full module names.

    Raises:
        ArtifactError: a key of `rank_pattern` or `alpha_pattern` that is not a plain name; values out of range.
    """
    for field in ("rank_pattern", "alpha_pattern"):
        table = config.get(field) or {}
        if not isinstance(table, dict) or not all(isinstance(k, str) and _PLAIN_NAME.fullmatch(k) for k in table):
            raise ArtifactError(f"{directory / MANIFEST}: {field} must map full module names to numbers. Save the adapter again with peft_safety.")
        for name, value in table.items():
            rank, alpha = (value, 1) if field == "rank_pattern" else (1, value)
            check_numbers(rank, alpha, 0, f"{directory / MANIFEST}, {field}[{name!r}]")
