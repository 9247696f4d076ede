"""One copy of each basis per device, shared by all leaves and adapters that use it (q, k and v; one subspace)."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_placed: dict[tuple[int, torch.device], tuple[weakref.ref[Tensor], int, weakref.ref[Tensor]]] = {}
"""`(source, its version, copy)` by the id of the source and the device. Ids are reused, so the source is compared."""
leaves: weakref.WeakSet[Any] = weakref.WeakSet()
"""Every `ProtectedLinear` that lives: `rebase` must not overwrite a basis that another one uses."""


def placed(source: Tensor, device: torch.device) -> Tensor:
    """An fp32 copy of a basis `(d, k)` on a device, made once and alive as long as a leaf holds it."""
    origin, version, copy = _placed.get((id(source), device), (None, 0, None))
    existing = None if copy is None else copy()
    if existing is not None and origin is not None and origin() is source and version == _version(source):
        return existing
    dtype = torch.float32 if source.is_floating_point() else source.dtype  # tokens of an embedding
    return _remember(source, source.detach().to(device=device, dtype=dtype, copy=True))


def moved(basis: Tensor, device: torch.device) -> Tensor:
    return basis if basis.device == device else placed(basis, device)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # what is made in inference mode has no counter


def _remember(source: Tensor, copy: Tensor) -> Tensor:
    for key, (origin, _, kept) in list(_placed.items()):
        if origin() is None or kept() is None or kept() is copy:
            del _placed[key]
    _placed[id(source), copy.device] = (weakref.ref(source), _version(source), weakref.ref(copy))
    return copy


@torch.no_grad()
def rebase(new: Mapping[Any, Tensor | None]) -> None:
    """Give leaves other bases `(d, k)`, or None. In place where a tensor keeps its shape and all its users get the
    same one, so that compiled and captured graphs stay valid; a tensor that anybody else uses is left alone.
    """
    users: dict[int, list[Any]] = defaultdict(list)
    for leaf in new:
        users[id(leaf.basis)].append(leaf)
    foreign = {id(leaf.basis) for leaf in list(leaves) if leaf not in new}
    for sharing in users.values():
        old, basis = sharing[0].basis, new[sharing[0]]
        alone = id(old) not in foreign and all(new[leaf] is basis for leaf in sharing)
        if alone and old is not None and basis is not None and old.shape == basis.shape:
            _remember(basis, old.copy_(basis))
            continue
        for leaf in sharing:
            basis = new[leaf]
            leaf.basis = None if basis is None else placed(basis, leaf.raw().device)
