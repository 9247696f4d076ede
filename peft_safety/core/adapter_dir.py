"""The adapter on disk: what a protected adapter directory must hold, and the check that it does.

`adapter_config.json` is the manifest: it names the other files and their sha256, and carries one over itself.
`adapter_model.safetensors` holds PEFT's plain keys with *projected* factors. `safety_subspace.safetensors` holds the
bases, for exactly the modules of the adapter. Nothing here builds or needs a model.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from torch import Tensor

from peft_safety.core import base_weights as weights
from peft_safety.core import files
from peft_safety.core.plain_lora import (
    ADAPTER_FILE,
    DTYPES,
    EXTRA_DTYPES,
    MANIFEST,
    PREFIX,
    check_sizes,
    config_of,
    read_manifest,
    read_tensor,
)
from peft_safety.core.projection import Side, leak, leak_tolerance
from peft_safety.core.subspace import SafetySubspace
from peft_safety.core.subspace_file import FILE_NAME as SUBSPACE_FILE
from peft_safety.errors import ArtifactError

FREE_FIELDS = ("base_model_name_or_path", "revision", "inference_mode")
"""Fields of the manifest that may be edited: they do not change what the adapter computes."""

_PLAIN_NAME = re.compile(r"[\w.\-]+")
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.(?P<factor>lora_A|lora_B)\.(?P<kind>weight|initial)")


@dataclass(frozen=True)
class StoredAdapter:
    """A checked adapter directory.

    Attributes:
        config: the JSON of `adapter_config.json`.
        subspace: its bases.
        shapes: `{module: (out_features, in_features, rank)}`.
        residual: whether it has frozen initial factors.
        leaks: `{module: ||U^T B|| / ||B||}`.
        extra_tensors: keys of other trained tensors, which no projection constrains (`modules_to_save`, resized
            embeddings).
    """

    directory: Path
    config: dict[str, Any]
    subspace: SafetySubspace
    shapes: dict[str, tuple[int, int, int]]
    residual: bool
    leaks: dict[str, float]
    extra_tensors: tuple[str, ...]

    def comes_from(self, source: str, subfolder: str | None) -> bool:
        """Whether this adapter was read from `source` (a directory or a Hub id)."""
        local = Path(source, subfolder) if subfolder else Path(source)
        return (
            self.directory.resolve() == local.resolve()
            if local.is_dir()
            else source.replace("/", "--") in str(self.directory)
        )


def protected_types() -> list[str]:
    """Values of `peft_type` that promise a protected adapter: the methods that are registered with PEFT."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING  # importing PEFT registers them

    return [str(name) for name, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items() if hasattr(cls, "safety_artifact")]


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Refuse what a stored config of this package never holds: wrong types, numbers out of range, and regular
    expressions, which can take forever to match.

    Raises:
        ArtifactError: a pattern, or a key of `rank_pattern` or `alpha_pattern`, that is not a full module name.
        ConfigError: a number out of range.
    """
    modules = config.get("target_modules")
    if not isinstance(modules, list) or not all(isinstance(m, str) and _PLAIN_NAME.fullmatch(m) for m in modules):
        raise ArtifactError(
            f"{where}: target_modules must list full module names, not patterns. Save the adapter again."
        )
    for field in ("exclude_modules", "layers_to_transform", "layers_pattern"):
        if config.get(field):
            raise ArtifactError(f"{where}: {field} cannot be combined with full module names. Save the adapter again.")
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(m, str) and m for m in saved):
        raise ArtifactError(f"{where}: modules_to_save must list module names. Save the adapter again.")
    for field in ("rank_pattern", "alpha_pattern"):
        table = config.get(field) or {}
        if not isinstance(table, dict) or not set(table) <= set(modules):
            raise ArtifactError(
                f"{where}: {field} must map names in target_modules to numbers. Save the adapter again."
            )
    check_sizes(config, where)


def check_adapter(directory: Path, warn: bool = False) -> StoredAdapter:
    """Check an adapter directory in full: files, hashes, keys, shapes, finiteness, orthonormality, and that the
    factors do not leak.

    Args:
        warn: see `read_manifest`.

    Raises:
        ArtifactError: anything but the exact set of files and tensors, or a changed byte.
        ConfigError: a number of the config that is out of range.
        SubspaceError: bases that would not protect.
    """
    config, path = read_manifest(directory, warn), directory / MANIFEST
    kind = config.get("peft_type")
    if kind not in protected_types():
        raise ArtifactError(
            f"{path}: peft_type {kind!r} promises no protection. Give a directory of type "
            f"{' or '.join(protected_types())}."
        )
    _refuse_pickles(directory)
    record = _record(path, config)
    check_config(config, str(path))
    if record["config"] != config_digest(config):
        raise ArtifactError(
            f"{path} is not the config that was saved (its sha256 differs; only {', '.join(FREE_FIELDS)} may change). "
            "Copy or save it again."
        )
    for name, expected in record["files"].items():
        file = files.child(directory, name)
        if not file.is_file():
            raise ArtifactError(f"{file} is missing. Copy the whole directory.")
        if files.sha256(file) != expected:
            raise ArtifactError(f"{file} is not the file that was saved (its sha256 differs). Copy or save it again.")
    subspace = SafetySubspace.load(files.child(directory, record["subspace"]))
    method = config_of(config, path)
    _check_subspace(directory / SUBSPACE_FILE, subspace, method.basis_sides)
    shapes, leaks = _check_factors(directory, config, subspace, method, record["extra_tensors"])
    return StoredAdapter(directory, config, subspace, shapes, method.residual, leaks, tuple(record["extra_tensors"]))


def seal(directory: Path) -> None:
    """Complete the manifest of a new directory: hash of the adapter file, extra tensors, and hash of the config."""
    path = directory / MANIFEST
    config = files.read_json(path)
    record = config["safety_artifact"]
    record["files"][ADAPTER_FILE] = files.sha256(directory / ADAPTER_FILE)
    with files.open_tensors(directory / ADAPTER_FILE) as handle:
        keys = list(handle.keys())
    record["extra_tensors"] = sorted(key for key in keys if _factor(key, config["target_modules"]) is None)
    sign(config)
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def sign(config: dict[str, Any]) -> None:
    """Put the hash of a config into its `safety_artifact` entry."""
    config["safety_artifact"]["config"] = config_digest(config)


def config_digest(config: Mapping[str, Any]) -> str:
    """sha256 of a config's canonical JSON, without the fields that may change and without the hash itself."""
    fixed = {k: v for k, v in config.items() if k not in FREE_FIELDS}
    fixed["safety_artifact"] = {k: v for k, v in config["safety_artifact"].items() if k != "config"}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def base_key(key: str, targets: Container[str]) -> str:
    """The base model's key of a tensor. PEFT stores the weight of a targeted head under `base_layer`."""
    module, _, kind = key.removeprefix(PREFIX).rpartition(".")
    inner = module.removesuffix(".base_layer")
    return f"{inner if inner in targets else module}.{kind}"


def _factor(key: str, targets: Container[str]) -> re.Match[str] | None:
    """The parts of a factor's key; None for other keys. An ordinary module may be called lora_A too."""
    match = _KEY.fullmatch(key)
    return match if match is not None and match["module"] in targets else None


def _record(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The `safety_artifact` entry with checked types."""
    record = config.get("safety_artifact")
    if (
        not isinstance(record, dict)
        or not isinstance(record.get("files"), dict)
        or record.get("subspace") != SUBSPACE_FILE
    ):
        raise ArtifactError(
            f"{path}: no complete 'safety_artifact' entry (subspace {SUBSPACE_FILE!r} and the files' hashes). Save "
            "the adapter again."
        )
    hashes, extra = record["files"], record.get("extra_tensors", [])
    if (
        SUBSPACE_FILE not in hashes
        or set(hashes) - {SUBSPACE_FILE, ADAPTER_FILE}
        or not all(isinstance(h, str) for h in hashes.values())
    ):
        raise ArtifactError(
            f"{path}: 'files' lists {str(sorted(hashes))[:200]}; it must list {SUBSPACE_FILE} and may list "
            f"{ADAPTER_FILE}. Save the adapter again."
        )
    if not isinstance(extra, list) or not all(isinstance(key, str) for key in extra):
        raise ArtifactError(f"{path}: 'extra_tensors' must be a list of tensor names. Save the adapter again.")
    return {"subspace": SUBSPACE_FILE, "files": hashes, "extra_tensors": extra, "config": record.get("config")}


def _check_subspace(path: Path, subspace: SafetySubspace, wanted: tuple[Side, ...]) -> None:
    """Check that every module has the bases that the method needs, and a fingerprint of its base weight."""
    for module, sides in subspace.bases.items():
        missing = [side for side in wanted if side not in sides]
        if missing or module not in subspace.fingerprints:
            what = f"no {missing[0]!r} basis" if missing else "no fingerprint of the base weight"
            raise ArtifactError(f"{path}: {module} has {what}, which the adapter needs. Save the adapter again.")


def _refuse_pickles(directory: Path) -> None:
    for path in directory.iterdir():
        if path.name.startswith("adapter_model") and path.suffix in files.PICKLES:
            raise ArtifactError(
                f"{path} is a pickle and is never opened: it can run code. Remove it, or convert it to {ADAPTER_FILE}."
            )


def _check_factors(
    directory: Path,
    config: dict[str, Any],
    subspace: SafetySubspace,
    method: Any,
    extra: Sequence[str],
) -> tuple[dict[str, tuple[int, int, int]], dict[str, float]]:
    """`StoredAdapter.shapes` and `leaks`.

    Args:
        method: the config that PEFT makes of `config`.
        extra: keys of the tensors that are no factors.
    """
    path = files.child(directory, ADAPTER_FILE)
    factors: dict[str, dict[str, str]] = {}
    others = set()
    with files.open_tensors(path) as handle:
        for key in handle.keys():  # noqa: SIM118
            match = _factor(key, config["target_modules"])
            if match is None:
                others.add(key)
            else:
                factors.setdefault(match["module"], {})[f"{match['factor']}.{match['kind']}"] = key
        if others != set(extra):
            raise ArtifactError(
                f"{path}: unknown or missing tensors {sorted(others ^ set(extra))[:3]}; it must hold exactly what "
                f"{MANIFEST} lists. Copy or save it again."
            )
        listed = {"the subspace": subspace.bases, f"target_modules in {MANIFEST}": config["target_modules"]}
        for what, modules in listed.items():
            if differing := sorted(set(factors) ^ set(modules)):
                raise ArtifactError(
                    f"{path}: {len(factors)} modules, but {what} has {len(modules)}; they differ at {differing[:3]}. "
                    "Copy or save the adapter again."
                )
        expected = {"lora_A.weight", "lora_B.weight"}
        if method.residual:
            expected |= {"lora_A.initial", "lora_B.initial"}
        shapes, leaks = {}, {}
        for module, keys in sorted(factors.items()):
            if set(keys) != expected:
                raise ArtifactError(
                    f"{path}: {module} has {sorted(keys)}, expected {sorted(expected)}. Copy or save the adapter "
                    "again."
                )
            headers = {kind: tuple(handle.get_slice(key).get_shape()) for kind, key in keys.items()}
            shapes[module] = _check_shapes(path, module, headers, subspace, config)
            tensors = {kind: read_tensor(handle, path, key, DTYPES) for kind, key in keys.items()}
            leaks[module] = _worst_leak(
                path, module, tensors, {side: subspace.bases[module][side] for side in method.sides}
            )
        for key in extra:
            _check_extra(path, key, handle, subspace, config.get("modules_to_save") or [])
    return shapes, leaks


def _check_shapes(
    path: Path, module: str, shapes: dict[str, tuple[int, ...]], subspace: SafetySubspace, config: Mapping[str, Any]
) -> tuple[int, int, int]:
    """Check shapes by the header, before tensors are read. Returns `(out_features, in_features, rank)`."""
    a, b = shapes["lora_A.weight"], shapes["lora_B.weight"]
    rank = (config.get("rank_pattern") or {}).get(module, config["r"])
    fits = (
        len(a) == len(b) == 2 and a[0] == b[1] == rank and (1 <= rank <= min(a[1], b[0]) or rank == config["r"])
    )  # r may exceed a narrow layer
    fits = fits and all(
        shapes[f"{f}.initial"] == shapes[f"{f}.weight"] for f in ("lora_A", "lora_B") if f"{f}.initial" in shapes
    )
    for side, d in (("out", b[0] if b else 0), ("in", a[-1] if a else 0)):
        basis = subspace.bases[module].get(side)  # type: ignore[call-overload]
        fits = fits and (basis is None or basis.shape[0] == d)
    if not fits:
        bases = {side: tuple(u.shape) for side, u in subspace.bases[module].items()}
        raise ArtifactError(
            f"{path}: {module} has lora_A {a}, lora_B {b}, which do not fit rank {rank} and bases {bases}. Save the "
            "adapter again."
        )
    return int(b[0]), int(a[1]), int(rank)


def _worst_leak(path: Path, module: str, tensors: Mapping[str, Tensor], bases: Mapping[Side, Tensor]) -> float:
    worst = 0.0
    for side, u in bases.items():
        factor = "lora_B" if side == "out" else "lora_A"
        for kind in tensors.keys() & {f"{factor}.weight", f"{factor}.initial"}:
            share, limit = leak(u, tensors[kind], side), leak_tolerance(tensors[kind].dtype)
            if not share <= limit:
                raise ArtifactError(
                    f"{path}: {module}.{kind} {tuple(tensors[kind].shape)} reaches {share:.2g} of its norm into the "
                    f"protected subspace (limit {limit:.2g}). Train or save the adapter again."
                )
            worst = max(worst, share)
    return worst


def _check_extra(path: Path, key: str, handle: Any, subspace: SafetySubspace, saved: Sequence[str]) -> None:
    """Check an extra tensor: it must not be a hidden factor, nor replace a base weight under a protected update."""
    base, _, kind = base_key(key, subspace.bases).rpartition(".")
    under_base = base in subspace.bases and key == f"{PREFIX}{base}.base_layer.{kind}"
    around = list(accumulate(base.split("."), lambda path, part: f"{path}.{part}"))
    disguised = "lora_" in key and not under_base and not any(path.endswith(tuple(saved)) for path in around)
    if not key.startswith(PREFIX) or disguised or (not under_base and any(path in subspace.bases for path in around)):
        raise ArtifactError(
            f"{path}: unknown tensor {key!r}; it is neither a factor nor of a module in modules_to_save. Save the "
            "adapter again."
        )
    tensor = read_tensor(handle, path, key, EXTRA_DTYPES)
    if under_base and kind == "weight":  # PEFT stores a targeted embedding or head whole: then it must be the base's
        sample = weights.sample(tensor.float()) if tensor.ndim == 2 else tensor
        reference = subspace.fingerprints[base]
        if sample.shape != reference.shape or not weights.distance(sample, reference) <= weights.DISTANCE_DENSE:
            raise ArtifactError(
                f"{path}: {key} {tuple(tensor.shape)} is not the subspace's base weight. Save the adapter again."
            )
