"""`verify`: does this directory hold a protected adapter, whole and unchanged?"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from torch import nn

from peft_safety.artifact import StoredAdapter
from peft_safety.estimate.targets import base_layers
from peft_safety.methods.protected import stored_adapter
from peft_safety.projection import orthonormality_error


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


def verify(directory: str | os.PathLike[str], model: nn.Module | None = None) -> Verification:
    """Check a protected adapter directory in full, without building a model.

    Args:
        directory: what `save_pretrained` wrote.
        model: a base model to compare with the stored fingerprints; optional.

    Raises:
        PeftSafetyError: what is wrong, with the file, the module, the shapes and the remedy.
    """
    stored = stored_adapter(directory)
    if model is not None:
        layers = base_layers(model)
        known = {name: layers[name] for name in stored.shapes if name in layers}
        for side in {side for sides in stored.subspace.bases.values() for side in sides}:
            stored.subspace.check_fits(known, side, bind=False)
        _all_there(stored, known)
    bases = [u for sides in stored.subspace.bases.values() for u in sides.values()]
    return Verification(
        directory=os.fspath(directory),
        method=str(stored.config["peft_type"]),
        modules=len(stored.shapes),
        ranks=tuple(sorted({rank for _, _, rank in stored.shapes.values()})),
        protected=tuple(sorted({int(u.shape[1]) for u in bases})),
        worst_leak=max(stored.leaks.values()),
        worst_orthonormality=max(orthonormality_error(u) for u in bases),
        base_checked=model is not None,
        unconstrained=stored.extra_tensors,
        provenance=stored.subspace.provenance,
    )


def _all_there(stored: StoredAdapter, known: dict[str, nn.Module]) -> None:
    from peft_safety.errors import SubspaceError

    missing = sorted(set(stored.shapes) - set(known))
    if missing:
        raise SubspaceError(
            f"{missing[0]}: the model has no such layer ({len(missing)} of {len(stored.shapes)} are missing). Give the base model the adapter was trained on."
        )
