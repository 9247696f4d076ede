"""`verify`: does this directory hold a protected adapter, whole and unchanged?"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from torch import nn

from peft_safety.estimate.targets import base_layers
from peft_safety.methods.protected import check_ahead, stored_adapter, stored_config
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
        model: a base model to compare with the shapes and the stored fingerprints; optional.

    Raises:
        PeftSafetyError: what is wrong, with the file, the module, the shapes and the remedy.
    """
    stored = stored_adapter(directory)
    config = stored_config(stored)
    if model is not None:
        layers = base_layers(model)
        check_ahead(model, config)
        stored.subspace.check_fits({name: layers[name] for name in stored.shapes}, config.SIDE, bind=False)
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
