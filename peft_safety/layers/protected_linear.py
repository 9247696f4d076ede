"""One protected leaf in place of `lora_A` or `lora_B`.

PEFT computes `lora_B(lora_A(dropout(x))) * scaling` in every layer class, quantized ones and mixed batches included,
so a leaf there constrains them all. Its parameter stays the raw trainable weight under its usual name; every forward
computes with the projection, `C B` or `A C`. An optimizer may move the raw weight out of the complement. Since `C` is
idempotent, the trajectory of `C B` stays the same when the raw weight is replaced by its projection. This *folding*
happens wherever somebody may look past the forward: when `.weight` is read, on `eval()`, on load, in `state_dict()`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from peft_safety.core import projection
from peft_safety.core.projection import Side
from peft_safety.layers.convolution import Convolution, Factor, product, sizes
from peft_safety.layers.layout import fresh, lay_out
from peft_safety.layers.shared_bases import leaves, moved, placed

DTYPE_READERS: set[CodeType] = set()
"""The forwards of PEFT's layers, which read `lora_A.weight` for its dtype only and need no fold. `registry` fills this
set. A forward that is missing costs time, not safety.
"""

_DEFERRED: ContextVar[bool] = ContextVar("_DEFERRED", default=False)


@contextmanager
def deferred_folds() -> Iterator[None]:
    """No leaf folds in the block, in which PEFT reads, copies and casts each of them several times. Fold after it."""
    token = _DEFERRED.set(True)
    try:
        yield
    finally:
        _DEFERRED.reset(token)


def folds_deferred() -> bool:
    return _DEFERRED.get()


class _Project(torch.autograd.Function):
    """A factor's projection, with that of its gradient, `dB = C dB'`."""

    @staticmethod
    def forward(ctx: Any, factor: Tensor, basis: Tensor, side: Side) -> Tensor:
        # not `save_for_backward`: DDP broadcasts buffers, equal values, into the basis at every forward, and autograd
        # would take that for a change
        ctx.basis, ctx.side = basis, side
        return projection.project_wide(basis, factor, side)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        with _without_autocast(gradient.device.type):
            return projection.project_wide(ctx.basis, gradient, ctx.side), None, None


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def project(basis: Tensor, factor: Tensor, side: Side) -> Tensor:
    """The projection of a factor, whose rows may have further dimensions; differentiable, autocast off."""
    with _without_autocast(factor.device.type):
        rows = factor.flatten(1)
        if _traced():  # plain products, which a compiler fuses and functional transforms differentiate
            return projection.project_wide(basis.to(factor.device), rows, side).view(factor.shape)
        projected: Tensor = _Project.apply(rows, moved(basis, factor.device), side)  # type: ignore[no-untyped-call]
        return projected.view(factor.shape)


class ProtectedLinear(Factor):
    """`lora_B` with `C = I - U U^T` before it (side "out"), `lora_A` with `C` behind it (side "in") or with the
    projection `U U^T` onto a window (side "window"), or an unconstrained factor with a residual.

    Attributes:
        weight: the raw trainable factor, `(out_features, r)` for "out", else `(r, in_features)`; on a convolution with
            further dimensions, see `layers.convolution`.
        basis: `U (d, k)`, fp32, non-persistent, untouched by dtype casts; None for a factor that is not constrained.
        initial: the frozen initial factor (persistent, shape of `weight`) of a non-destructive residual, or None.
            `lora_A` then gives `[A x; A0 x]`, and `lora_B` computes `C B a - B0 a0`: bit-identical to zero at first.

    Reference: SaLoRA, arXiv 2501.01765, section 4; the folding is ours.
    """

    basis: Tensor | None
    initial: Tensor | None
    side: Side
    _decoding: tuple[tuple[int, int, int], tuple[Tensor, Tensor | None]] | None
    """The state of the weight at the last decoded token, and the factors that were made from it."""

    @classmethod
    def replacing(cls, linear: nn.Module, basis: Tensor | None, side: Side, residual: bool = False) -> ProtectedLinear:
        """A leaf around the very Parameter of `linear`, on its device. `residual` allocates `initial`, as zeros."""
        weight: nn.Parameter = linear._parameters["weight"]  # type: ignore[assignment]
        leaf = cls.__new__(cls)
        nn.Module.__init__(leaf)  # not nn.Linear's, which would make a weight first
        leaf.in_features, leaf.out_features = sizes(linear)
        leaf.side, leaf.weight, leaf.convolution = side, weight, Convolution.of(linear)
        leaf.register_parameter("bias", None)
        device = torch.device("cpu") if weight.is_meta else weight.device
        leaf.register_buffer("basis", None if basis is None else placed(basis, device), persistent=False)
        initial = torch.zeros(weight.shape, device=device, dtype=weight.dtype) if residual else None
        leaf.register_buffer("initial", initial)
        leaf.training, leaf._decoding = linear.training, None
        leaves.add(leaf)
        return leaf

    def reset_parameters(self) -> None:
        """Nothing: the weight is PEFT's, which initializes it."""

    def forward(self, x: Tensor) -> Tensor:
        weight, initial = self.factors(x)
        if initial is None:
            return product(self.convolution, x, weight)
        if self.side == "in":
            return torch.cat([product(None, x, weight), product(None, x, initial)], dim=-1)
        # copies: a view that starts at an odd address may take another kernel, and the products must be equal to the
        # last bit where the factors are
        trained, frozen = (half.clone(memory_format=torch.contiguous_format) for half in x.chunk(2, dim=-1))
        return product(None, trained, weight) - product(None, frozen, initial)

    def factors(self, x: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The projected weight, and the frozen initial factor of a residual, in the same dtype. A single token in eval
        mode, without gradients, takes the factors of the token before if nobody has written the weight since. A write
        past torch's version counter (through `.data`) is seen by the next longer input.
        """
        raw = self.raw()
        single = x is not None and x.shape[-2:-1] == (1,)
        decoding = single and not (self.training or torch.is_grad_enabled() or _traced() or _is_untracked(raw))
        last = self._decoding
        if decoding and last is not None and last[0] == _state(raw):
            return last[1]
        weight = self.projected()
        result = weight, None if self.initial is None else self._projection(self.initial.to(weight.dtype))
        if decoding or last is not None:
            self._decoding = (_state(raw), result) if decoding else None
        return result

    def projected(self) -> Tensor:
        """The projected weight, differentiable, in the dtype of `weight`; computed in fp32 or better."""
        return self._projection(self.raw())

    def raw(self) -> Tensor:
        """The unprojected weight, without the fold that reading `.weight` implies."""
        weight = self._parameters.get("weight")
        return self.__dict__["weight"] if weight is None else weight  # a replica of `nn.DataParallel` has an attribute

    def _projection(self, factor: Tensor) -> Tensor:
        return factor if self.basis is None else project(self.basis, factor, self.side)

    @torch.no_grad()
    def set_initial(self, value: Tensor) -> None:
        """Fill `weight` and `initial` with `value`, so that the function does not change."""
        weight = self.raw()
        weight.copy_(value)
        self.fold()
        self.initial = weight.detach().clone()

    @torch.no_grad()
    def fold(self) -> bool:
        """Replace the raw weight, and the frozen one, by its projection if it leaks; returns whether it did. A weight
        that is not whole here (a shard, or on the meta device) is left alone: `folded_state` folds it.
        """
        self._decoding = None
        weight = self.raw()
        factors = [weight]
        if self.initial is not None:
            if self.initial.dtype != weight.dtype:  # PEFT and TRL cast parameters only; one file stores one dtype
                self.initial = self.initial.to(weight.dtype)
            factors.append(self.initial)
        if self.basis is None or _DEFERRED.get() or not is_whole(weight, self.basis, self.side):
            return False
        if self.basis.device != weight.device:
            self.basis = moved(self.basis, weight.device)
        return any([fold_rows(self.basis, factor, self.side) for factor in factors])

    def train(self, mode: bool = True) -> ProtectedLinear:
        super().train(mode)
        if not mode:
            self.fold()
        return self

    def __getattr__(self, name: str) -> Any:
        # Parameters live in `_parameters`, so `.weight` arrives here: a reader past the forward gets a folded one.
        own = name == "weight" and name in self._parameters
        if own and not torch.compiler.is_compiling() and sys._getframe(1).f_code not in DTYPE_READERS:
            self.fold()
        return super().__getattr__(name)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.fold()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *rest: Any, **kw: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest, **kw)
        if local_metadata.get("assign_to_params_buffers"):  # the caller's own tensors, of a file as a rule
            lay_out(self)
            self.initial = None if self.initial is None else fresh(self.initial)
        self.fold()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ProtectedLinear:
        basis, self.basis, self._decoding = self.basis, None, None
        try:
            super()._apply(fn, recurse)
        finally:
            self.basis = basis
        if basis is not None:  # follow moves to another device, ignore casts: a bf16 basis would leak 3.6e-4
            device = fn(basis.new_zeros(1)).device
            if device.type != "meta":
                self.basis = moved(basis, device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_decoding": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        leaves.add(self)

    def extra_repr(self) -> str:
        k = 0 if self.basis is None else self.basis.shape[1]
        return f"{super().extra_repr()}, side={self.side}, k={k}, residual={self.initial is not None}"


def protected_leaves(model: nn.Module) -> Iterator[tuple[str, ProtectedLinear]]:
    """Every leaf of a model with its name, in module order (equal on all ranks)."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, ProtectedLinear))


@torch.no_grad()
def fold_rows(basis: Tensor, factor: Tensor, side: Side) -> bool:
    """`projection.fold_` of a factor, whose rows may have further dimensions, in any memory format."""
    rows = factor.flatten(1)
    written = projection.fold_(basis, rows, side)
    if written and factor.ndim > 2:
        factor.copy_(rows.view(factor.shape))
    return written


def _traced() -> bool:
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def _state(weight: Tensor) -> tuple[int, int, int]:
    return id(weight), weight._version, weight.data_ptr()


def _is_untracked(weight: Tensor) -> bool:
    """Whether nothing may be kept for the next call: writes are not counted, or a CUDA graph records addresses."""
    return weight.is_inference() or (weight.is_cuda and torch.cuda.is_current_stream_capturing())


def is_here(weight: Tensor) -> bool:
    """Whether this is a factor with values here: not meta, not a shard."""
    return not weight.is_meta and not hasattr(weight, "device_mesh") and weight.ndim >= 2


def is_whole(weight: Tensor, basis: Tensor, side: Side) -> bool:
    """Whether the weight is a whole tensor here: not meta, not a shard, not flattened by a sharding wrapper."""
    return is_here(weight) and projection.fits(basis, len(weight) if side == "out" else weight[0].numel())
