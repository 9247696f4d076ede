"""The mechanism: one protected leaf in place of `lora_A` or `lora_B`.

PEFT computes `lora_B(lora_A(dropout(x))) * scaling` in every layer class, quantised ones and mixed batches included, so a leaf there constrains them all. The
leaf's parameter stays the raw trainable weight under its usual name; what it computes with is the projected one, `C B` or `A C`. The raw weight is *folded*
(replaced by its projection) after every optimizer step, when it is loaded, and whenever somebody reads `.weight`: since `C` is idempotent and commutes with
weight decay, the trajectory of `C B` is the same, and a reader that bypasses the forward finds a weight that is already safe.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from peft_safety import projection
from peft_safety.errors import ProtectionError
from peft_safety.projection import Side


class ProtectedLinear(nn.Linear):
    """`lora_B` with `C = I - U U^T` before it (side "out"), or `lora_A` with `C` behind it (side "in"), or an unconstrained factor with a residual.

    Attributes:
        weight: the raw trainable factor, `(out_features, r)` for "out" or `(r, in_features)` for "in".
        basis: `U (d, k)`, fp32, non-persistent, untouched by dtype casts; None for a factor that is not constrained.
        initial: the frozen initial factor (persistent, shape of `weight`) of a non-destructive residual, or None. `lora_A` then gives `[A x; A0 x]`, and
            `lora_B` computes `C B a - B0 a0`: bit-identical to zero at initialisation, where both products are the same.

    Reference: SaLoRA, arXiv 2501.01765, section 4; the folding is ours.
    """

    basis: Tensor | None
    initial: Tensor | None
    side: Side

    @classmethod
    def replacing(cls, linear: nn.Module, basis: Tensor | None, side: Side, residual: bool = False) -> ProtectedLinear:
        """A leaf around the very Parameter of `linear`, on its device.

        Args:
            residual: allocate `initial`, zero until `set_initial` or a load fills it.
        """
        weight: nn.Parameter = linear._parameters["weight"]  # type: ignore[assignment]
        leaf = cls(int(linear.in_features), int(linear.out_features), bias=False, device="meta")  # type: ignore[arg-type]
        leaf.side = side
        leaf.weight = weight
        device = torch.device("cpu") if weight.is_meta else weight.device
        leaf.register_buffer("basis", None if basis is None else basis.to(device=device, dtype=torch.float32, copy=True), persistent=False)
        leaf.register_buffer("initial", torch.zeros(weight.shape, device=device, dtype=weight.dtype) if residual else None)
        leaf.train(linear.training)
        _LEAVES.add(leaf)
        return leaf

    def reset_parameters(self) -> None:
        """Nothing: the weight is PEFT's, which initialises it."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.projected()
        if self.initial is None:
            return F.linear(x, weight)
        initial = self._project(self.initial.to(weight.dtype))
        if self.side == "in":
            return torch.cat([F.linear(x, weight), F.linear(x, initial)], dim=-1)
        # copies: a view that starts at an odd address may take another kernel, and the products must be equal to the last bit where the factors are
        trained, frozen = (half.clone(memory_format=torch.contiguous_format) for half in x.chunk(2, dim=-1))
        return F.linear(trained, weight) - F.linear(frozen, initial)

    def projected(self) -> Tensor:
        """The weight that counts, differentiable, in the dtype of `weight`; projected in fp32 whatever autocast says."""
        return self._project(self.raw())

    def raw(self) -> Tensor:
        """The unprojected weight, without the fold that reading `.weight` implies. A replica of `nn.DataParallel` keeps it as a plain attribute."""
        weight = self._parameters.get("weight")
        return self.__dict__["weight"] if weight is None else weight

    def _project(self, factor: Tensor) -> Tensor:
        if self.basis is None:
            return factor
        with torch.autocast(device_type=factor.device.type, enabled=False):
            basis = self.basis.to(factor.device)
            return projection.project_out(basis, factor.to(basis.dtype), self.side).to(factor.dtype)

    @torch.no_grad()
    def set_initial(self, value: Tensor) -> None:
        """Start from `value` and take `value` out again, so that the function does not change: fills `weight` and `initial`."""
        weight = self.raw()
        weight.copy_(value)
        self.fold()
        self.initial = weight.detach().clone()

    @torch.no_grad()
    def fold(self) -> bool:
        """Replace the raw weight (and the frozen one) by its projection if it leaks; changes no bit of one that doesn't. Returns whether it wrote."""
        weight = self.raw()
        factors = [weight]
        if self.initial is not None:
            if self.initial.dtype != weight.dtype:  # PEFT and TRL cast parameters only; the two are comparable, and storable, in one dtype
                self.initial = self.initial.to(weight.dtype)
            factors.append(self.initial)
        if self.basis is None or not _plain(weight, self.basis, self.side):
            return False
        self.basis = self.basis.to(weight.device)
        return any([projection.fold_(self.basis, factor, self.side) for factor in factors])

    @torch.no_grad()
    def fold_after_step(self) -> None:
        """One unconditional projection without a host synchronisation, on the local shard if the weight is sharded."""
        weight = self.raw()
        if self.basis is None:
            return
        if hasattr(weight, "device_mesh"):
            _fold_shard(weight, self.basis, self.side)
        elif _plain(weight, self.basis, self.side):
            weight.copy_(self._project(weight))

    def __getattr__(self, name: str) -> Any:
        # Parameters live in `_parameters`, so `.weight` arrives here: whoever reads it past the forward gets a folded one.
        if name == "weight" and name in self._parameters and not torch.compiler.is_compiling():
            self.fold()
        return super().__getattr__(name)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.fold()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.fold()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ProtectedLinear:
        basis, self.basis = self.basis, None
        try:
            super()._apply(fn, recurse)
        finally:
            self.basis = basis
        if basis is not None:  # follow moves to another device, ignore casts: a bf16 basis would leak 3.6e-4
            device = fn(basis.new_zeros(1)).device
            if device.type != "meta":
                self.basis = basis.to(device)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _LEAVES.add(self)

    def extra_repr(self) -> str:
        k = 0 if self.basis is None else self.basis.shape[1]
        return f"{super().extra_repr()}, side={self.side}, k={k}, residual={self.initial is not None}"


def protected_leaves(model: nn.Module) -> Iterator[tuple[str, ProtectedLinear]]:
    """Every leaf of a model with its name, in module order (equal on all ranks)."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, ProtectedLinear))


def check_leaf(leaf: nn.Module, name: str, basis: Tensor | None, side: Side, residual: bool = False) -> None:
    """Refuse a leaf that does not hold the constraint.

    Args:
        basis: the expected one; None for the other factor of an adapter with a residual.

    Raises:
        ProtectionError: an ordinary module stands in its place, its basis is not the expected one, or a factor is not finite.
    """
    if not isinstance(leaf, ProtectedLinear) or leaf.side != side or (leaf.initial is not None) != residual:
        raise ProtectionError(f"{name}: a {type(leaf).__name__} stands where a protected leaf belongs; something replaced it. Load the adapter again.")
    found = leaf.basis
    equal = found is basis is None or (found is not None and basis is not None and found.dtype == torch.float32 and torch.equal(found.cpu(), basis))
    if not equal:
        shapes = ["none" if u is None else f"{tuple(u.shape)} {u.dtype}" for u in (found, basis)]
        raise ProtectionError(f"{name}: its basis ({shapes[0]}) is not the subspace's ({shapes[1]}). Load the adapter again.")
    for factor in (leaf.raw(), leaf.initial):
        if factor is None or hasattr(factor, "device_mesh") or factor.is_meta or bool(torch.isfinite(factor).all()):
            continue
        raise ProtectionError(f"{name}: a factor {tuple(factor.shape)} holds NaN or Inf. Lower the learning rate, and load the last good checkpoint.")


_LEAVES: weakref.WeakSet[ProtectedLinear] = weakref.WeakSet()


def _after_optimizer_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Fold what this optimizer has just moved. Leaves are taken in the order of its parameters, which all ranks share."""
    by_weight = {id(leaf._parameters.get("weight")): leaf for leaf in _LEAVES}
    for group in optimizer.param_groups:
        if _stands_still(group):
            continue
        for parameter in group["params"]:
            leaf = by_weight.get(id(parameter))
            if leaf is not None and parameter.grad is not None:
                leaf.fold_after_step()


def _stands_still(group: dict[str, Any]) -> bool:
    """Whether a step has moved nothing because its rate is 0. torch's distributed checkpoints load optimizer states behind such a step, and projecting once
    more would change the last bits of what they have just restored."""
    lr: Any = group.get("lr")
    on_host = isinstance(lr, (int, float)) or (isinstance(lr, Tensor) and lr.device.type == "cpu")
    return on_host and float(lr) == 0


register_optimizer_step_post_hook(_after_optimizer_step)


def _plain(weight: Tensor, basis: Tensor, side: Side) -> bool:
    """Whether the weight is a whole tensor here: not meta, not a shard, not flattened by a sharding wrapper."""
    return not weight.is_meta and not hasattr(weight, "device_mesh") and weight.ndim == 2 and weight.shape[0 if side == "out" else 1] == basis.shape[0]


def _fold_shard(weight: Any, basis: Tensor, side: Side) -> None:
    """Fold one shard of a DTensor that is split along its first dimension: one all-reduce of `k x r`, and only for the output side."""
    from torch.distributed._functional_collectives import all_reduce
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    local: Tensor = weight.to_local()
    placements = list(weight.placements)
    if any(not p.is_replicate() and p != Shard(0) for p in placements):
        raise ProtectionError(
            f"a protected factor is sharded as {placements}; only Shard(0) is supported. Keep adapters replicated, or shard them by FSDP2's default."
        )
    if side == "in" or all(p.is_replicate() for p in placements):
        local.copy_(projection.project_out(basis.to(local.device), local.to(basis.dtype), side))
        return
    shape, offset = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
    rows = basis.to(local.device)[offset[0] : offset[0] + shape[0]]
    coefficients = rows.mT @ local.to(basis.dtype)
    for dimension, placement in enumerate(placements):
        if placement == Shard(0):
            coefficients = all_reduce(coefficients, "sum", (weight.device_mesh, dimension))
    local.copy_(local.to(basis.dtype) - rows @ coefficients)
