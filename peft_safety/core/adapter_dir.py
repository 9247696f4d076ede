"""The adapter on disk: what a protected adapter directory must hold, and the check that it does, without any model.

`adapter_config.json` is the manifest: it names the other files and their sha256, and carries one over itself.
`adapter_model.safetensors` holds *projected* factors, `safety_subspace.safetensors` the bases of exactly its modules.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peft_safety.core import base_weights as weights
from peft_safety.core import files, plain_lora
from peft_safety.core.factor_forms import Form
from peft_safety.core.features import MAX_RANK, check_sizes
from peft_safety.core.plain_lora import ADAPTER_FILE, MANIFEST, PREFIX, broken
from peft_safety.core.projection import HALF, Side, fits, leak, leak_tolerance
from peft_safety.core.subspace import SafetySubspace
from peft_safety.core.subspace_file import FILE_NAME as SUBSPACE_FILE
from peft_safety.errors import ArtifactError

FREE_FIELDS = ("base_model_name_or_path", "revision", "inference_mode")
"""Fields of the manifest that may be edited: they do not change what the adapter computes."""

_PLAIN_NAME = re.compile(r"[\w.\-]+")
VELORA = "lora_velora_embed"
"""The direction `(ceil(in_features / num_groups),)` onto which VeLoRA compresses inputs, which PEFT stores too."""
_FACTOR = re.compile(
    rf"base_model\.model\.(?P<module>.+)\.(?P<kind>lora_(?:[AB]\.(?:weight|initial)|embedding_[AB])|{VELORA})"
)


@dataclass(frozen=True)
class StoredAdapter:
    """A checked directory. `shapes` are `{module: (out_features, in_features, rank)}`, `worst_leak` is the largest
    `||U^T B|| / ||B||`, `rounded_to` the 16-bit dtype of the factor behind it, if it is in one, and `extra_tensors`
    are keys of tensors that no projection constrains. `forms`: how the factors are stored.
    """

    directory: Path
    config: dict[str, Any]
    subspace: SafetySubspace
    shapes: dict[str, tuple[int, int, int]]
    residual: bool
    worst_leak: float
    rounded_to: str | None
    extra_tensors: tuple[str, ...]
    forms: dict[str, Form]


def protected_types() -> list[str]:
    """The values of `peft_type` that promise a protected adapter."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING  # importing PEFT registers them

    return [str(name) for name, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items() if hasattr(cls, "safety_artifact")]


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Refuse wrong types, numbers out of range, and patterns, which can take forever to match, in a stored config."""
    modules: Any = config.get("target_modules")
    saved = config.get("modules_to_save") or []
    if not _is_text_list(modules) or not are_names(modules):
        raise broken(where, "target_modules must list full module names, not patterns")
    for field in ("exclude_modules", "layers_to_transform", "layers_pattern"):
        if config.get(field):
            raise broken(where, f"{field} cannot be combined with full module names")
    if not _is_text_list(saved) or not are_names(saved):
        raise broken(where, "modules_to_save must list module names, not patterns")
    for field in ("rank_pattern", "alpha_pattern"):
        table = config.get(field) or {}
        if not isinstance(table, dict) or not set(table) <= set(modules):
            raise broken(where, f"{field} must map names in target_modules to numbers")
    check_sizes(config, where)


def check_adapter(directory: Path) -> StoredAdapter:
    """Check files, hashes, keys, shapes, finiteness, orthonormality, and that no factor leaks. An ArtifactError
    refuses anything but the exact set of files and tensors; a SubspaceError bases that would not protect.
    """
    config, path = plain_lora.read_manifest(directory, warn=False), directory / MANIFEST
    kind, types = config.get("peft_type"), protected_types()
    if kind not in types:
        remedy = f"Give one of {' or '.join(types)}."
        if kind == "LORA":
            remedy = "It is an ordinary LoRA without a certificate. Make it blind with peft-safety repair."
        raise ArtifactError(f"{path}: peft_type {kind!r} promises no protection. {remedy}")
    for file in directory.glob("adapter_model*"):
        if file.suffix in files.PICKLES:
            raise ArtifactError(f"{file} is a pickle and is never opened: it can run code. Remove it.")
    hashes, extra = _record(path, config)
    check_config(config, str(path))
    if config["safety_artifact"].get("config") != config_digest(config):
        raise broken(path, f"not the config that was saved (sha256 differs; only {', '.join(FREE_FIELDS)} may change)")
    for name, expected in hashes.items():
        file = files.child(directory, name)
        if not file.is_file():
            raise ArtifactError(f"{file} is missing. Copy the whole directory.")
        if files.sha256(file) != expected:
            raise ArtifactError(f"{file} is not the file that was saved (its sha256 differs). Copy or save it again.")
    subspace = SafetySubspace.load(files.child(directory, SUBSPACE_FILE))
    method = plain_lora.config_of(config, path)
    for module, sides in subspace.bases.items():
        missing = [f"{side!r} basis" for side in method.basis_sides if side not in sides]
        missing += ["fingerprint of the base weight"] if module not in subspace.fingerprints else []
        if missing:
            raise broken(directory / SUBSPACE_FILE, f"{module} has no {missing[0]}, which the adapter needs")
    path = files.child(directory, ADAPTER_FILE)
    shapes, forms, (worst, rounded_to) = _check_factors(path, config, subspace, method, extra)
    return StoredAdapter(directory, config, subspace, shapes, method.residual, worst, rounded_to, tuple(extra), forms)


def seal(directory: Path) -> None:
    """Complete the manifest of a new directory: hash of the adapter file, extra tensors, and hash of the config."""
    path, file = directory / MANIFEST, directory / ADAPTER_FILE
    config = files.read_json(path, files.MAX_LISTING_BYTES)
    record = config["safety_artifact"]
    record["files"][ADAPTER_FILE] = files.sha256(file)
    with files.open_tensors(file) as handle:
        record["extra_tensors"] = sorted(k for k in handle.keys() if _factor(k, config["target_modules"]) is None)  # noqa: SIM118
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
    match = _FACTOR.fullmatch(key)
    return match if match is not None and match["module"] in targets else None


def _canonical(kind: str) -> str:
    """The kind of a factor, with that of an embedding named as a linear one's."""
    return f"{kind.replace('embedding_', '')}.weight" if "embedding_" in kind else kind


def are_names(texts: Iterable[Any]) -> bool:
    """Whether these are names, in which PEFT cannot see a regular expression that takes long."""
    return all(isinstance(text, str) and _PLAIN_NAME.fullmatch(text) for text in texts)


def _is_text_list(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _record(path: Path, config: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    """The files' hashes, and the keys of the extra tensors, as the manifest says."""
    record = config.get("safety_artifact")
    hashes = record.get("files") if isinstance(record, dict) and record.get("subspace") == SUBSPACE_FILE else None
    if not isinstance(record, dict) or not isinstance(hashes, dict):
        raise broken(path, f"no complete 'safety_artifact' entry (subspace {SUBSPACE_FILE!r} and the files' hashes)")
    named = {SUBSPACE_FILE} <= set(hashes) <= {SUBSPACE_FILE, ADAPTER_FILE}
    if not named or not _is_text_list(list(hashes.values())):
        what = f"it must list {SUBSPACE_FILE} and may list {ADAPTER_FILE}"
        raise broken(path, f"'files' lists {str(sorted(hashes))[:200]}; {what}")
    extra = record.get("extra_tensors", [])
    if not _is_text_list(extra):
        raise broken(path, "'extra_tensors' must be a list of tensor names")
    return hashes, extra


def _check_factors(
    path: Path, config: Mapping[str, Any], subspace: SafetySubspace, method: Any, extra: Sequence[str]
) -> tuple[dict[str, tuple[int, int, int]], dict[str, Form], tuple[float, str | None]]:
    """`StoredAdapter.shapes`, `forms`, `worst_leak` and `rounded_to`; `method` is PEFT's config."""
    kinds = ("weight", "initial") if method.residual else ("weight",)
    expected = {f"lora_{factor}.{kind}" for factor in "AB" for kind in kinds}
    expected |= {VELORA} if getattr(method, "velora_config", None) is not None else set()
    factors: dict[str, dict[str, str]] = {}
    others = set()
    with files.open_tensors(path) as handle:
        for key in handle.keys():  # noqa: SIM118
            match = _factor(key, config["target_modules"])
            if match is None:
                others.add(key)
            elif factors.setdefault(match["module"], {}).setdefault(_canonical(match["kind"]), key) != key:
                raise broken(path, f"{match['module']} has two factors {_canonical(match['kind'])}")
        if differing := sorted(others ^ set(extra)):
            raise broken(path, f"unknown or missing tensors {differing[:3]}; it must hold what {MANIFEST} lists")
        listed = {"the subspace": subspace.bases, f"target_modules in {MANIFEST}": config["target_modules"]}
        for what, modules in listed.items():
            if differing := sorted(set(factors) ^ set(modules)):
                counts = f"{len(factors)} modules, but {what} has {len(modules)}"
                raise broken(path, f"{counts}; they differ at {differing[:3]}")
        shapes: dict[str, tuple[int, int, int]] = {}
        forms: dict[str, Form] = {}
        worst, dtype = 0.0, torch.float32
        for module, keys in sorted(factors.items()):
            if set(keys) != expected:
                raise broken(path, f"{module} has {sorted(keys)}, expected {sorted(expected)}")
            headers = {kind: tuple(handle.get_slice(key).get_shape()) for kind, key in keys.items()}
            forms[module] = _form(path, module, headers, keys)
            shapes[module] = _check_shapes(path, module, headers, subspace, config)
            _check_direction(path, module, headers.get(VELORA), shapes[module][1], method)
            read = {k: plain_lora.read_tensor(handle, path, key, plain_lora.DTYPES) for k, key in keys.items()}
            tensors = {kind: tensor if kind == VELORA else tensor.flatten(1) for kind, tensor in read.items()}
            alpha = (config.get("alpha_pattern") or {}).get(module, config["lora_alpha"])
            a, b = (max((tensors[f"lora_{x}.{kind}"] for kind in kinds), key=_largest) for x in "AB")
            plain_lora.check_product(path, module, a, b, plain_lora.scaling_of(alpha, shapes[module][2], config))
            for kind, factor in tensors.items():
                side: Side = "out" if kind.startswith("lora_B") else method.a_side
                if kind == VELORA or side not in method.sides:
                    continue
                share, limit = leak(subspace.bases[module][side], factor, side), leak_tolerance(factor.dtype)
                if not share <= limit:
                    where = "out of its window" if side == "window" else "into the protected subspace"
                    raise ArtifactError(
                        f"{path}: {module}.{kind} {tuple(factor.shape)} reaches {share:.2g} of its norm {where} "
                        f"(limit {limit:.2g}). Train or save the adapter again."
                    )
                worst, dtype = max((worst, dtype), (share, factor.dtype), key=lambda pair: pair[0])
        for key in extra:
            _check_extra(path, key, handle, subspace, config.get("modules_to_save") or [])
    return shapes, forms, (worst, half_name(dtype))


def _form(path: Path, module: str, shapes: Mapping[str, Any], keys: Mapping[str, str]) -> Form:
    """The form of two factors, by the shapes in the header and the keys."""
    a, b = shapes["lora_A.weight"], shapes["lora_B.weight"]
    form = plain_lora.stored_form(module, {x: keys[f"lora_{x}.weight"] for x in "AB"}, a, b)
    if form is None or not (len(keys) == 2 or form.is_linear):  # initial factors are those of linear layers
        raise broken(path, f"{module} has lora_A {a} and lora_B {b}, which are no factors of one layer")
    return form


def half_name(dtype: torch.dtype) -> str | None:
    """`"bfloat16"` or `"float16"`, in which rounding is what leaks; None for fp32."""
    return str(dtype).removeprefix("torch.") if dtype in HALF else None


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max())


def _check_shapes(
    path: Path, module: str, shapes: Mapping[str, Any], subspace: SafetySubspace, config: Mapping[str, Any]
) -> tuple[int, int, int]:
    """Check the shapes in the header, before tensors are read. Returns `(out_features, in_features, rank)`."""
    a, b = shapes["lora_A.weight"], shapes["lora_B.weight"]
    rank = (config.get("rank_pattern") or {}).get(module, config["r"])
    n = math.prod(a[1:])
    sized = a[0] == rank and (shapes.get("lora_A.initial", a), shapes.get("lora_B.initial", b)) == (a, b)
    given = subspace.bases[module]
    bases = {side: tuple(u.shape) for side, u in given.items()}
    if not sized or not all(fits(u, b[0] if side == "out" else n) for side, u in given.items()):
        raise broken(path, f"{module} has lora_A {a}, lora_B {b}, which do not fit rank {rank} and bases {bases}")
    return int(b[0]), n, int(rank)


def _check_direction(path: Path, module: str, shape: tuple[int, ...] | None, features: int, method: Any) -> None:
    """Check the shape of VeLoRA's direction, which only makes gradients."""
    if shape is None:
        return
    groups = method.velora_config.num_groups
    if type(groups) is not int or not 1 <= groups <= MAX_RANK or shape != (-(-features // groups),):
        raise broken(path, f"{module}.{VELORA} {shape} does not fit {features} inputs in num_groups={groups!r}")


def _check_extra(path: Path, key: str, handle: Any, subspace: SafetySubspace, saved: Sequence[str]) -> None:
    """Check an extra tensor: it must not be a hidden factor, nor replace a base weight under a protected update."""
    base, _, kind = base_key(key, subspace.bases).rpartition(".")
    under_base = base in subspace.bases and key == f"{PREFIX}{base}.base_layer.{kind}"
    around = list(accumulate(base.split("."), lambda path, part: f"{path}.{part}"))
    disguised = "lora_" in key and not under_base and not any(path.endswith(tuple(saved)) for path in around)
    if not key.startswith(PREFIX) or disguised or (not under_base and any(path in subspace.bases for path in around)):
        raise broken(path, f"unknown tensor {key!r}; it is neither a factor nor of a module in modules_to_save")
    tensor = plain_lora.read_tensor(handle, path, key, plain_lora.EXTRA_DTYPES)
    if under_base and kind == "weight":  # PEFT stores a targeted embedding or head whole: then it must be the base's
        sample = weights.sample(tensor.float()) if tensor.ndim == 2 else tensor
        reference = subspace.fingerprints[base]
        if sample.shape != reference.shape or not weights.distance(sample, reference) <= weights.DISTANCE_DENSE:
            raise broken(path, f"{key} {tuple(tensor.shape)} is not the base weight that the subspace is of")
