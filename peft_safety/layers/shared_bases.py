"""One copy of each basis per device, shared by all layers and adapters that use it (q, k and v; one subspace)."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Mapping
from typing import Protocol, TypeVar

import torch
from torch import Tensor


class Leaf(Protocol):
    """What is asked of a `ProtectedLinear` here."""

    basis: Tensor | None

    def raw(self) -> Tensor:
        """The trained factor."""


AnyLeaf = TypeVar("AnyLeaf", bound=Leaf)


_Entry = tuple["weakref.ref[Tensor]", int, "weakref.ref[Tensor]"]
_placed: dict[tuple[int, torch.device], _Entry] = {}
"""Copies by the id of their source. The source and its version are compared too, as ids are reused."""

_leaves: weakref.WeakSet[Leaf] = weakref.WeakSet()


def enlist(leaf: Leaf) -> None:
    """Register a layer while it lives: `rebase` must not overwrite a basis that another layer uses."""
    _leaves.add(leaf)


def placed(source: Tensor, device: torch.device) -> Tensor:
    """An fp32 copy of a basis `(d, k)` on a device, made once and alive as long as a layer holds it."""
    key = (id(source), device)
    entry = _placed.get(key)
    if entry is not None and entry[0]() is source and entry[1] == _version(source):
        existing = entry[2]()
        if existing is not None:
            return existing
    return _remember(source, source.detach().to(device=device, dtype=torch.float32, copy=True), key)


def moved(basis: Tensor, device: torch.device) -> Tensor:
    """A layer's basis on another device, shared as before."""
    return basis if basis.device == device else placed(basis, device)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # what is made in inference mode has no counter


def _remember(source: Tensor, copy: Tensor, key: tuple[int, torch.device]) -> Tensor:
    for old in [k for k, (origin, _, kept) in _placed.items() if origin() is None or kept() is None]:
        del _placed[old]
    _placed[key] = (weakref.ref(source), _version(source), weakref.ref(copy))
    return copy


@torch.no_grad()
def rebase(new: Mapping[AnyLeaf, Tensor | None]) -> None:
    """Give leaves other bases. In place where a tensor keeps its shape and all its users get the same one, so that
    compiled graphs and captured ones stay valid; a tensor that anybody else uses is left alone.

    Args:
        new: each leaf's basis `(d, k)`, or None.
    """
    users: dict[int, list[AnyLeaf]] = defaultdict(list)
    for leaf in new:
        users[id(leaf.basis)].append(leaf)
    foreign = {id(leaf.basis) for leaf in list(_leaves) if leaf not in new}
    for leaves in users.values():
        old, wanted = leaves[0].basis, {id(new[leaf]): new[leaf] for leaf in leaves}
        first = next(iter(wanted.values()))
        if (
            old is not None
            and first is not None
            and len(wanted) == 1
            and id(old) not in foreign
            and old.shape == first.shape
        ):
            old.copy_(first)
            for key in [k for k, (_, _, kept) in _placed.items() if kept() is old]:
                del _placed[key]
            _remember(first, old, (id(first), old.device))
            continue
        for leaf in leaves:
            basis = new[leaf]
            leaf.basis = None if basis is None else placed(basis, leaf.raw().device)
