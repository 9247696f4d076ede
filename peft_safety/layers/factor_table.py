"""The factors of an embedding. PEFT keeps them as parameters in a table by adapter, and looks them up in a forward.

So the table takes the place of a leaf: looking up a constrained factor projects it, looking up a frozen one detaches
it. The parameters, `parameters()` and `items()` stay the raw ones; they are folded where a leaf's are, see
`protected_linear`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from peft_safety.core.names import own_name
from peft_safety.core.projection import HALF, Side, all_finite, leak, leak_tolerance
from peft_safety.errors import ProtectionError
from peft_safety.layers.frozen_linear import check_certified_rows
from peft_safety.layers.protected_linear import fold_rows, folds_deferred, is_whole, project
from peft_safety.layers.shared_bases import moved, placed
from peft_safety.layers.stored import saved

_RAW: ContextVar[bool] = ContextVar("_RAW", default=False)


@contextmanager
def raw_factors() -> Iterator[None]:
    """Look-ups give the parameters in the block, in which PEFT writes to them. Fold after it."""
    token = _RAW.set(True)
    try:
        yield
    finally:
        _RAW.reset(token)


class FactorTable(nn.ParameterDict):
    """`lora_embedding_A`, of factors `(r, vocabulary)`, or `lora_embedding_B`, `(dim, r)`, of one layer.

    Attributes:
        constraints: `(basis, side)` by adapter; the basis may be a set of tokens, see `core.projection`.
        frozen: by adapter, the table of the trained factor behind a frozen one, whose dtype it takes.
    """

    constraints: dict[str, tuple[Tensor, Side]]
    frozen: dict[str, nn.ParameterDict]

    @classmethod
    def of(cls, table: nn.ParameterDict) -> FactorTable:
        """PEFT's table itself, as one of this class."""
        if isinstance(table, cls):
            return table
        table.__class__ = cls
        own: Any = table
        own.constraints, own.frozen = {}, {}
        result: FactorTable = own
        return result

    def constrain(self, adapter: str, basis: Tensor, side: Side) -> None:
        device = self.raw(adapter).device
        where = torch.device("cpu") if device.type == "meta" else device
        self.constraints = {**self.constraints, adapter: (placed(basis, where), side)}

    def freeze(self, adapter: str, behind: nn.ParameterDict) -> None:
        self.raw(adapter).requires_grad_(False)
        self.frozen = {**self.frozen, adapter: behind}

    def raw(self, adapter: str) -> nn.Parameter:
        parameter: nn.Parameter = getattr(self, adapter)
        return parameter

    def __getitem__(self, adapter: str) -> Any:
        raw = super().__getitem__(adapter)
        if raw.is_meta or (not torch.compiler.is_compiling() and _RAW.get()):  # no compiler traces a ContextVar
            return raw
        if adapter in self.frozen:  # no flag, optimizer or hook can train it
            behind = getattr(self.frozen[adapter], adapter, raw)
            return raw.detach().to(behind.dtype)
        if adapter in self.constraints:
            basis, side = self.constraints[adapter]
            return project(moved(basis, raw.device), raw, side)
        return raw

    def __setitem__(self, adapter: str, value: Any) -> None:
        """PEFT moves and casts a factor by assigning what it has looked up, which is no parameter: the flag stays, and
        so do the values of a frozen factor, which a look-up rounds.
        """
        known = adapter in self.constraints or adapter in self.frozen
        if not known or isinstance(value, nn.Parameter) or not isinstance(value, Tensor):
            super().__setitem__(adapter, value)
            return
        raw = self.raw(adapter)
        dtype = torch.promote_types(raw.dtype, value.dtype)
        raw.data = raw.detach().to(value.device, dtype) if adapter in self.frozen else value.detach()

    def __delitem__(self, adapter: str) -> None:
        super().__delitem__(adapter)
        self.constraints = {name: value for name, value in self.constraints.items() if name != adapter}
        self.frozen = {name: value for name, value in self.frozen.items() if name != adapter}

    def items(self) -> Any:
        return ((adapter, self.raw(adapter)) for adapter in self)

    def values(self) -> Any:
        return (self.raw(adapter) for adapter in self)

    def fold(self, adapter: str) -> bool:
        """Replace a constrained raw factor by its projection if it leaks, as `ProtectedLinear.fold` does."""
        basis, side = self.constraints[adapter]
        raw = self.raw(adapter)
        if folds_deferred() or not is_whole(raw, basis, side):
            return False
        with torch.no_grad():
            return fold_rows(moved(basis, raw.device), raw, side)

    @property
    def is_half(self) -> bool:
        """Whether a constrained factor is held in 16 bits."""
        return any(self.raw(adapter).dtype in HALF for adapter in self.constraints)

    def fold_all(self) -> None:
        for adapter in self.constraints:
            if adapter in self:
                self.fold(adapter)

    def train(self, mode: bool = True) -> FactorTable:
        super().train(mode)
        if not mode:
            self.fold_all()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.fold_all()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.fold_all()


@torch.no_grad()
def freeze_table(layer: Any, adapter: str, a: Tensor) -> None:
    """`frozen_linear.freeze` of an embedding."""
    table = FactorTable.of(layer.lora_embedding_A)
    raw = table.raw(adapter)
    value = torch.zeros(raw.shape, dtype=torch.promote_types(raw.dtype, a.dtype), device=raw.device)
    if not raw.is_meta:
        value[: len(a)].copy_(a)
    raw.data = value
    table.freeze(adapter, layer.lora_embedding_B)
    layer.frozen_peft_weight_names = {**layer.frozen_peft_weight_names, adapter: ("lora_embedding_A",)}


def protected_tables(model: nn.Module) -> Iterator[tuple[str, FactorTable]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, FactorTable))


def fold_tables(model: nn.Module) -> None:
    for _, table in protected_tables(model):
        table.fold_all()


@torch.no_grad()
def folded_tables(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """`stored.folded_state` of the constrained factors in tables."""
    result = dict(state)
    for name, table in protected_tables(model):
        for adapter, (basis, side) in table.constraints.items():
            key = f"{own_name(name)}.{adapter}"
            if key not in result:
                continue
            if not is_whole(result[key], basis, side):
                raise ProtectionError(
                    f"{key} {tuple(result[key].shape)} is a shard or on the meta device. Pass save_pretrained the "
                    "gathered weights as state_dict."
                )
            result[key] = saved(basis, result[key], side)
    return result


@torch.no_grad()
def stored_entry(table: nn.ParameterDict, adapter: str) -> Tensor:
    """A factor as it is saved: folded, a constrained one in fp32 or better, see `stored.saved`."""
    raw: Tensor = getattr(table, adapter).detach()
    if not isinstance(table, FactorTable) or adapter not in table.constraints:
        return raw
    basis, side = table.constraints[adapter]
    return saved(basis, raw, side)


def check_constrained(table: nn.Module, adapter: str, name: str, basis: Tensor, side: Side) -> None:
    """`check_leaf` of a factor in a table."""
    known = table.constraints.get(adapter) if isinstance(table, FactorTable) and adapter in table else None
    if known is None or known[1] != side or not torch.equal(known[0].cpu(), basis):
        raise ProtectionError(f"{name}: its factor is not constrained as the subspace says. Load the adapter again.")
    assert isinstance(table, FactorTable)
    raw = table.raw(adapter)
    if not is_whole(raw, basis, side):
        return
    used = table[adapter].detach()
    if (share := leak(known[0].to(used.device), used, side)) > (limit := leak_tolerance(used.dtype)):
        raise ProtectionError(f"{name}: {share:.2g} of its factor leaks (limit {limit:.2g}). Load the adapter again.")
    if not all_finite(raw):
        raise ProtectionError(
            f"{name}: a factor {tuple(raw.shape)} holds NaN or Inf. Lower the learning rate, and load the last good "
            "checkpoint."
        )


def check_frozen_table(table: nn.Module, adapter: str, name: str, certified: Any) -> None:
    """`check_frozen` of a factor in a table."""
    if not isinstance(table, FactorTable) or adapter not in table.frozen:
        raise ProtectionError(
            f"{name}: a {type(table).__name__} stands where the frozen lora_A belongs. Load the adapter again."
        )
    check_certified_rows(table.raw(adapter), name, certified)
