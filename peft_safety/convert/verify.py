"""`verify`: does this directory hold a protected adapter, whole and unchanged?"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peft_safety.convert.acting import acting, shares
from peft_safety.core import base_weights as weights
from peft_safety.core.adapter_dir import check_adapter, half_name
from peft_safety.core.certificate import Certificate, read_certificate
from peft_safety.core.plain_lora import (
    MANIFEST,
    PLAIN_TYPES,
    REPAIRED_TYPE,
    Factors,
    read_manifest,
    read_plain,
    stored_record,
)
from peft_safety.core.projection import fits, fold_tolerance, leak, leak_tolerance, orthonormality_error
from peft_safety.core.snapshot import reading
from peft_safety.core.subspace import SafetySubspace
from peft_safety.core.targets import base_layers
from peft_safety.errors import ArtifactError, ProtectionError
from peft_safety.methods.factors import protected_factors
from peft_safety.methods.safe_lora.repair import factor_digest, scaling_digest
from peft_safety.registry.checks import check_ahead
from peft_safety.registry.configs import stored_config
from peft_safety.registry.frozen import check_certified, freezing


@dataclass(frozen=True)
class Verification:
    """What was checked.

    Attributes:
        method: stored `peft_type`.
        modules, ranks, protected: how many modules; LoRA ranks and subspace ranks that occur.
        blindness_checked: False for a window without its null space: then `worst_leak` is the share of `lora_A`
            outside the window, and only the provenance (`window_leak`) says how far that reaches into the null space.
        worst_leak: largest `||U^T B|| / ||B||` of any module; with the null space of a window, `||A Q|| / ||A||`.
        rounded_to: "bfloat16" or "float16" if that leak is the rounding of a factor in 16 bits; None in fp32.
        worst_orthonormality: largest `max|U^T U - I|`.
        base_checked: whether the base weights were compared with the fingerprints.
        unconstrained: trained tensors that no projection covers.
    """

    directory: str
    method: str
    modules: int
    ranks: tuple[int, ...]
    protected: tuple[int, ...]
    blindness_checked: bool
    worst_leak: float
    rounded_to: str | None
    worst_orthonormality: float
    base_checked: bool
    unconstrained: tuple[str, ...]
    provenance: dict[str, Any]


@dataclass(frozen=True)
class FrozenVerification:
    """What was checked of a plain LoRA with a certificate. `worst_leak`, the largest `||A Q|| / ||A||`, was measured
    if `blindness_checked`; else it is the certificate's, with what rounding to 16 bits (`rounded_to`) may add.
    `protected` are the sizes of the null spaces.
    """

    directory: str
    method: str
    modules: int
    protected: tuple[int, ...]
    blindness_checked: bool
    worst_leak: float
    rounded_to: str | None
    base_checked: bool
    subspace: str
    settings: dict[str, Any]
    unconstrained: tuple[str, ...]


@dataclass(frozen=True)
class RepairVerification:
    """What was checked of an adapter that Safe LoRA has repaired; the very factors that the repair wrote are there."""

    directory: str
    method: str
    modules: int
    repaired: int
    record: dict[str, Any]


def verify(
    directory: str | os.PathLike[str],
    model: nn.Module | None = None,
    subspace: SafetySubspace | str | os.PathLike[str] | None = None,
) -> Verification | FrozenVerification | RepairVerification:
    """Check an adapter directory in full, without building a model: a protected one, one with a frozen factor and a
    certificate, or one that Safe LoRA has repaired.

    Args:
        directory: of an adapter.
        model: a base model to compare with the shapes and the stored fingerprints; optional.
        subspace: the one that the adapter was made with, or its file. It proves the blindness behind a certificate or
            a window, which take no other; the other forms also take one in which nothing of their update lies. With
            any other, and for an adapter without a constraint, the error says how much of the update lies in it: so an
            adapter from elsewhere can be measured on a subspace of your own.

    Returns:
        What was checked, by kind of adapter: method, modules, the largest leak, digests.

    Raises:
        ArtifactError: files that are missing, changed, or no adapter of these kinds.
        ProtectionError: a factor that reaches what it is blind to, or another subspace than the adapter's.
        SubspaceError: no subspace, or another base model.
    """
    inner = Path(directory) / "adapter"
    if (inner / MANIFEST).is_file() and not (Path(directory) / MANIFEST).exists():
        raise ArtifactError(f"{directory} is no adapter, but the folder of one. Give {inner}.")
    with reading(directory, warn=True) as path:
        return replace(_verify(path, model, subspace), directory=os.fspath(directory))


def _verify(
    path: Path, model: nn.Module | None, subspace: SafetySubspace | str | os.PathLike[str] | None
) -> Verification | FrozenVerification | RepairVerification:
    manifest = read_manifest(path, warn=False)
    kind, certificate = manifest.get("peft_type"), read_certificate(path)
    if certificate is not None:
        return _verify_frozen(path, certificate, model, subspace)
    repaired = kind == REPAIRED_TYPE or manifest.get("safe_lora") is not None
    if kind in PLAIN_TYPES:
        repaired = repaired or stored_record(path) is not None
        if subspace is not None:
            raise _unconstrained(path, subspace, repaired)
        if repaired:
            return _verify_repair(path)
    stored = check_adapter(path)
    config = stored_config(stored)
    if model is not None:
        layers = base_layers(model)
        check_ahead(model, config)
        stored.subspace.check_fits({name: layers[name] for name in stored.shapes}, config.basis_sides, bind=False)
    bases = [u for sides in stored.subspace.bases.values() for u in sides.values()]
    window, worst, rounded_to = "window" in config.sides, stored.worst_leak, stored.rounded_to
    factors = {} if subspace is None else protected_factors(stored, stored.shapes)
    if subspace is not None and not window:
        _check_kept_out(path, subspace, stored.subspace.digest, factors)
    if subspace is not None and window:
        space = _own_subspace(path, subspace, str(stored.subspace.provenance.get("null_space")), factors)
        reach = {n: _blindness(path, space, n, f.a, leak_tolerance(f.a.dtype)) for n, f in factors.items()}
        name = max(reach, key=lambda name: reach[name])
        worst, rounded_to = reach[name], half_name(factors[name].a.dtype)
    return Verification(
        directory=os.fspath(path),
        method=str(kind),
        modules=len(stored.shapes),
        ranks=tuple(sorted({rank for _, _, rank in stored.shapes.values()})),
        protected=tuple(sorted({int(u.shape[-1]) for u in bases})),
        blindness_checked=not window or subspace is not None,
        worst_leak=worst,
        rounded_to=rounded_to,
        worst_orthonormality=max(orthonormality_error(u) for u in bases),
        base_checked=model is not None,
        unconstrained=stored.extra_tensors,
        provenance=stored.subspace.provenance,
    )


def _verify_frozen(
    path: Path,
    certificate: Certificate,
    model: nn.Module | None,
    subspace: SafetySubspace | str | os.PathLike[str] | None,
) -> FrozenVerification:
    plain = check_certified(path, certificate)
    freezing(certificate).from_certificate(plain.config, certificate)  # refuses what could not be loaded
    rows, modules = plain.rows, certificate.modules
    layers = {} if model is None else base_layers(model, plain.fields.get("target_parameters"))
    if model is not None:
        for name, a in rows.items():
            shape = weights.shape(layers[name]) if name in layers else None
            if shape is None or shape[1] != a.shape[1]:
                raise ArtifactError(
                    f"{path}: lora_A {tuple(a.shape)} of {name}, where the model has {shape or 'no such layer'}. "
                    "Give the base that it was trained on."
                )
    precisions = {name: modules[name].precision(a) or a.dtype for name, a in rows.items()}
    # what rounding to 16 bits may let through; nothing for fp32
    rounding = {name: 0.0 if p == torch.float32 else fold_tolerance(p) for name, p in precisions.items()}
    leaks = {name: max(entry.leak, rounding[name]) for name, entry in modules.items()}
    if subspace is not None:
        space = _own_subspace(path, subspace, certificate.subspace, plain.factors)
        for name, a in rows.items():
            limit = max(leak_tolerance(precisions[name]), min(modules[name].leak, leak_tolerance(torch.bfloat16)))
            leaks[name] = _blindness(path, space, name, a, limit)
        if model is not None:
            space.check_fits({name: layers[name] for name in rows}, ("in",), bind=False)
    worst = max(leaks, key=lambda name: leaks[name])
    return FrozenVerification(
        directory=os.fspath(path),
        method=f"{certificate.method}, frozen A",
        modules=len(rows),
        protected=tuple(sorted({entry.k for entry in certificate.modules.values()})),
        blindness_checked=subspace is not None,
        worst_leak=leaks[worst],
        rounded_to=half_name(precisions[worst]),
        base_checked=subspace is not None and model is not None,
        subspace=certificate.subspace,
        settings=certificate.settings,
        unconstrained=tuple(sorted(plain.extra)),
    )


def _own_subspace(
    path: Path, subspace: SafetySubspace | str | os.PathLike[str], digest: str, factors: Mapping[str, Factors]
) -> SafetySubspace:
    """The given subspace, which must have this digest on the modules."""
    space = SafetySubspace.of(subspace, factors)
    if space.digest != digest:
        raise _another(path, space, digest, factors)
    return space


def _check_kept_out(
    path: Path, subspace: SafetySubspace | str | os.PathLike[str], digest: str, factors: Mapping[str, Factors]
) -> None:
    """Refuse a given subspace that is neither the adapter's own nor one in which nothing of its update lies."""
    space = SafetySubspace.of(subspace, factors)
    if space.digest != digest:
        found = shares(space, _pairs(factors))
        if len(found) < len(factors) or any(x > leak_tolerance(factors[name].a.dtype) for name, x in found.items()):
            raise _another(path, space, digest, factors)


def _another(path: Path, space: SafetySubspace, digest: str, factors: Mapping[str, Factors]) -> ProtectionError:
    return ProtectionError(
        f"{path}: the adapter was made with subspace {digest[:12]}, not {space.digest[:12]}: "
        f"{acting(space, _pairs(factors))}. Give that one, or make it blind to yours with peft-safety repair."
    )


def _unconstrained(
    path: Path, subspace: SafetySubspace | str | os.PathLike[str], repaired: bool
) -> ArtifactError | ProtectionError:
    """What is said of a plain LoRA that nothing keeps out of a subspace."""
    factors = read_plain(path, linear=False).factors
    found = acting(SafetySubspace.of(subspace, factors), _pairs(factors))
    if repaired:
        return ProtectionError(
            f"{path}: Safe LoRA keeps an update out of no subspace: {found}. Verify it without one."
        )
    kind = "peft_type 'LORA' promises no protection. It is an ordinary LoRA without a certificate"
    return ArtifactError(f"{path}: {kind}: {found}. Make it blind with peft-safety repair.")


def _pairs(factors: Mapping[str, Factors]) -> dict[str, tuple[Tensor, Tensor]]:
    return {name: (factor.a, factor.b) for name, factor in factors.items()}


def _blindness(path: Path, space: SafetySubspace, name: str, a: Tensor, limit: float) -> float:
    """`||A Q|| / ||A||` of a module, which must not exceed `limit`."""
    basis = space.bases.get(name, {}).get("in")
    share = 1.0 if basis is None or not fits(basis, a.shape[1]) else leak(basis, a, "in")
    if not share <= limit:
        raise ProtectionError(
            f"{path}: lora_A {tuple(a.shape)} of {name} reaches {share:.2g} of its norm into the null space (limit "
            f"{limit:.2g}). Repair the adapter."
        )
    return share


def _verify_repair(path: Path) -> RepairVerification:
    plain = read_plain(path)
    record, factors = plain.record, {name: (factor.a, factor.b) for name, factor in plain.factors.items()}
    if record is None:
        raise ProtectionError(f"{path}: Safe LoRA was never applied: as unsafe as any LoRA. Run peft-safety repair.")
    targets = plain.fields.get("target_modules")
    lacking = [n for n in factors if isinstance(targets, list) and not any(f".{n}".endswith(f".{t}") for t in targets)]
    if lacking or record.get("scaling", scaling_digest(plain.factors)) != scaling_digest(plain.factors):
        raise ProtectionError(
            f"{path}: its config has changed since Safe LoRA was applied: another scaling, or {lacking[:3]} left out "
            "of target_modules. Repair the adapter from its original."
        )
    if factor_digest(factors) != record.get("digest"):
        raise ProtectionError(
            f"{path}: the factors have changed since Safe LoRA was applied (trained on, combined or cast). Repair the "
            "adapter from its original."
        )
    kind, repaired = str(plain.fields["peft_type"]), record.get("repaired", 0)
    if type(repaired) is not int:
        raise ArtifactError(f"{path}: the record of the repair is damaged. Copy or save the adapter again.")
    return RepairVerification(str(path), kind, len(factors), repaired, record)
