"""`verify`: does this directory hold a protected adapter, whole and unchanged?"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from peft_safety.core.adapter_dir import check_adapter
from peft_safety.core.plain_lora import PLAIN_TYPES, REPAIRED_TYPE, read_manifest, read_plain, stored_record
from peft_safety.core.projection import orthonormality_error
from peft_safety.core.targets import base_layers
from peft_safety.errors import ProtectionError
from peft_safety.methods.safe_lora.repair import factor_digest
from peft_safety.registry.checks import check_ahead
from peft_safety.registry.configs import stored_config


@dataclass(frozen=True)
class Verification:
    """What was checked.

    Attributes:
        method: stored `peft_type`.
        modules, ranks, protected: how many modules; LoRA ranks and subspace ranks that occur.
        worst_leak: largest `||U^T B|| / ||B||` of any module.
        worst_orthonormality: largest `max|U^T U - I|`.
        base_checked: whether the base weights were compared with the fingerprints.
        unconstrained: trained tensors that no projection covers.
    """

    directory: str
    method: str
    modules: int
    ranks: tuple[int, ...]
    protected: tuple[int, ...]
    worst_leak: float
    worst_orthonormality: float
    base_checked: bool
    unconstrained: tuple[str, ...]
    provenance: dict[str, Any]


@dataclass(frozen=True)
class RepairVerification:
    """What was checked of an adapter that Safe LoRA has repaired: complete, finite, and the very factors that the
    repair wrote.

    Attributes:
        modules, repaired: how many there are, and how many of them were projected.
        record: options and both models, as `RepairReport.record`.
    """

    directory: str
    method: str
    modules: int
    repaired: int
    record: dict[str, Any]


def verify(directory: str | os.PathLike[str], model: nn.Module | None = None) -> Verification | RepairVerification:
    """Check an adapter directory in full, without building a model: a protected one, or one that Safe LoRA has
    repaired.

    Args:
        directory: what `save_pretrained` wrote.
        model: a base model to compare with the shapes and the stored fingerprints; optional.

    Raises:
        PeftSafetyError: what is wrong, with the file, the module, the shapes and the remedy.
    """
    path = Path(directory)
    manifest = read_manifest(path, warn=False)
    kind = manifest.get("peft_type")
    repaired = kind == REPAIRED_TYPE or manifest.get("safe_lora") is not None
    if kind in PLAIN_TYPES and (repaired or stored_record(path) is not None):
        return _verify_repair(path)
    stored = check_adapter(path, warn=True)
    config = stored_config(stored)
    if model is not None:
        layers = base_layers(model)
        check_ahead(model, config)
        stored.subspace.check_fits({name: layers[name] for name in stored.shapes}, config.basis_sides, bind=False)
    bases = [u for sides in stored.subspace.bases.values() for u in sides.values()]
    return Verification(
        directory=os.fspath(directory),
        method=str(kind),
        modules=len(stored.shapes),
        ranks=tuple(sorted({rank for _, _, rank in stored.shapes.values()})),
        protected=tuple(sorted({int(u.shape[1]) for u in bases})),
        worst_leak=stored.worst_leak,
        worst_orthonormality=max(orthonormality_error(u) for u in bases),
        base_checked=model is not None,
        unconstrained=stored.extra_tensors,
        provenance=stored.subspace.provenance,
    )


def _verify_repair(path: Path) -> RepairVerification:
    plain = read_plain(path)
    record, factors = plain.record, {name: (factor.a, factor.b) for name, factor in plain.factors.items()}
    if record is None:
        raise ProtectionError(
            f"{path}: Safe LoRA was never applied, so the adapter is as unsafe as any LoRA. Run peft-safety repair."
        )
    if factor_digest(factors) != record.get("digest"):
        raise ProtectionError(
            f"{path}: the factors have changed since Safe LoRA was applied (trained on, combined or cast). Repair the "
            "adapter from its original."
        )
    kind, repaired = str(plain.fields["peft_type"]), int(record.get("repaired", 0))
    return RepairVerification(str(path), kind, len(factors), repaired, record)
