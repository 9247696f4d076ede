"""One copy of a basis on each device, whoever uses it: q, k and v share their inputs' basis, two adapters of one
subspace share all of them.
"""

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
"""Copies by the id of their source, with the source itself and its version, so that neither a new tensor of an old id
nor a changed one is mistaken for it.
"""

_leaves: weakref.WeakSet[Leaf] = weakref.WeakSet()


def enlist(leaf: Leaf) -> None:
    """Remember a leaf as long as it lives: `rebase` must not write into a basis that another one uses."""
    _leaves.add(leaf)


def placed(source: Tensor, device: torch.device) -> Tensor:
    """The package's own fp32 copy of a basis `(d, k)` on a device: made once, alive as long as a leaf holds it. Never
    `source` itself, which may be the subspace's."""
    key = (id(source), device)
    found = _placed.get(key)
    if found is not None and found[0]() is source and found[1] == _version(source):
        there = found[2]()
        if there is not None:
            return there
    return _remember(source, source.detach().to(device=device, dtype=torch.float32, copy=True), key)


def moved(basis: Tensor, device: torch.device) -> Tensor:
    """A leaf's basis on another device, shared as it was; itself where it is there already."""
    return basis if basis.device == device else placed(basis, device)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # what is made in inference mode has no counter


def _remember(source: Tensor, copy: Tensor, key: tuple[int, torch.device]) -> Tensor:
    for old in [k for k, (origin, _, there) in _placed.items() if origin() is None or there() is None]:
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
            for key in [k for k, (_, _, there) in _placed.items() if there() is old]:
                del _placed[key]
            _remember(first, old, (id(first), old.device))
            continue
        for leaf in leaves:
            basis = new[leaf]
            leaf.basis = None if basis is None else placed(basis, leaf.raw().device)
