"""Subclasses of PEFT's LoRA layers. A layer becomes one when it gets protected leaves."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from peft.import_utils import is_bnb_4bit_available, is_bnb_available
from peft.tuners import lora
from peft.tuners.lora.layer import Conv1d, Conv2d, Conv3d
from peft.tuners.lora.layer import MultiheadAttention as PeftAttention
from peft.utils.other import transpose
from torch import Tensor, nn

from peft_safety.core import base_weights, kinds
from peft_safety.errors import LossyMergeError, UnsupportedLayerError
from peft_safety.layers import FrozenLinear, ProtectedLinear, stored_factors
from peft_safety.layers.adapters import weights_of
from peft_safety.layers.factor_table import FactorTable, raw_factors
from peft_safety.registry import fused


class _Residual:
    """Merges and conversions include the residual, and no merge is into a k-bit weight."""

    replaces: ClassVar[type]

    def _get_name(self) -> str:
        """What is printed is PEFT's name."""
        return self.replaces.__name__

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        layer: Any = self
        for adapter in adapter_names or layer.active_adapters:
            factors = [table[adapter] for table in (layer.lora_A, layer.lora_B) if adapter in table]
            if any(isinstance(factor, (ProtectedLinear, FrozenLinear)) for factor in factors):
                refuse_lossy_merge(layer, adapter, type(self).__name__)
        super().merge(safe_merge, adapter_names)  # type: ignore[misc]

    def get_delta_weight(self, adapter: str, *args: Any, **kwargs: Any) -> Any:
        """`s (C B A - C B0 A0)` with a residual, otherwise PEFT's `s B A` (reading B projects it). In fp32 where a
        factor is constrained or frozen and the trained ones are in 16 bits.
        """
        layer: Any = self
        leaves = layer.lora_A[adapter], layer.lora_B[adapter]
        if isinstance(leaves[0], FrozenLinear):
            return transpose(_blind_product(layer, adapter), getattr(layer, "fan_in_fan_out", False))
        factors = stored_factors(*leaves)
        if {factor.dtype for factor in factors} != {leaves[1].weight.dtype}:
            product = factors[1].float() @ factors[0].float()
            return transpose(product, getattr(layer, "fan_in_fan_out", False)) * layer.scaling[adapter]
        delta = super().get_delta_weight(adapter, *args, **kwargs)  # type: ignore[misc]
        a, b = (getattr(factors[adapter], "initial", None) for factors in (layer.lora_A, layer.lora_B))
        if a is None or b is None:
            return delta
        frozen = transpose(b.float() @ a.float(), getattr(layer, "fan_in_fan_out", False)) * layer.scaling[adapter]
        return (delta.float() - frozen).to(delta.dtype)


class LoraLinear(_Residual, lora.Linear):  # type: ignore[misc]
    replaces = lora.Linear


class _Convolution(_Residual):
    """The update is the product of the factors as matrices: PEFT's own takes some kernels for others."""

    def get_delta_weight(self, adapter: str, *args: Any, **kwargs: Any) -> Any:
        layer: Any = self
        base = layer.get_base_layer()
        if base.groups > 1:
            return super().get_delta_weight(adapter, *args, **kwargs)
        a, b = stored_factors(layer.lora_A[adapter], layer.lora_B[adapter])
        delta = kinds.as_stored(base, b.float() @ a.float()) * layer.scaling[adapter]
        return delta.to(torch.promote_types(a.dtype, b.dtype))


class LoraConv1d(_Convolution, Conv1d):  # type: ignore[misc]
    replaces = Conv1d


class LoraConv2d(_Convolution, Conv2d):  # type: ignore[misc]
    replaces = Conv2d


class LoraConv3d(_Convolution, Conv3d):  # type: ignore[misc]
    replaces = Conv3d


class LoraEmbedding(lora.Embedding):  # type: ignore[misc]
    replaces = lora.Embedding

    def _get_name(self) -> str:
        return self.replaces.__name__

    def _freeze_non_trainable_peft_weights(self, *args: Any, **kwargs: Any) -> None:
        """On the parameters, not on what a look-up makes of them."""
        with raw_factors():
            super()._freeze_non_trainable_peft_weights(*args, **kwargs)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """In fp32: a frozen factor is not rounded to the trained one's 16 bits."""
        a, b = (parameter.detach() for parameter in weights_of(self, adapter))
        table = self.lora_embedding_B
        b = table[adapter].detach() if isinstance(table, FactorTable) else b
        constrained = isinstance(self.lora_embedding_A, FactorTable) and adapter in self.lora_embedding_A.constraints
        a = self.lora_embedding_A[adapter].detach() if constrained else a
        delta: Tensor = (b.float() @ a.float()).T * self.scaling[adapter]
        return delta.to(torch.promote_types(a.dtype, b.dtype))


class MultiheadAttention(_Residual, PeftAttention):  # type: ignore[misc]  # PEFT asks for this name
    """On PyTorch's attention, under a frozen `lora_A`. Its forward merges the updates, and takes them out again."""

    replaces = PeftAttention

    @property
    def _qkv_same_embed_dim(self) -> bool:
        """What `nn.TransformerEncoderLayer` asks before its fast path, which in eval mode would compute with the base
        weights and call no adapter.
        """
        return bool(self.merged and self.get_base_layer()._qkv_same_embed_dim)

    def forward(self, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        if query.is_nested:
            raise UnsupportedLayerError(
                f"nn.MultiheadAttention({self.embed_dim}) gets a nested tensor, which PyTorch computes on its fast "
                "path only, without the adapter. Set use_nested_tensor = False on the nn.TransformerEncoder."
            )
        return super().forward(query, *args, **kwargs)


class ParamWrapper(lora.ParamWrapper):  # type: ignore[misc]  # PEFT asks for a class of this name
    """On a single parameter, under a frozen `lora_A` or an adapter of another kind."""

    replaces = lora.ParamWrapper

    def get_delta_factors(self, adapter: str) -> Any:
        """PEFT's, with the frozen one detached: no flag, optimizer or hook can train it."""
        left, right, scaling = super().get_delta_factors(adapter)
        if isinstance(self.lora_A[adapter], FrozenLinear):
            left, right = (left, right.detach()) if self._did_swap_in_out_features else (left.detach(), right)
        return left, right, scaling

    def get_delta_weight(self, adapter: str, *args: Any, **kwargs: Any) -> Any:
        """The update; with a frozen `lora_A`, which may be of another dtype, the product is in fp32."""
        if not isinstance(self.lora_A[adapter], FrozenLinear):
            return super().get_delta_weight(adapter, *args, **kwargs)
        if self._param_ndim == 2:
            return _blind_product(self, adapter).to(self.get_param())
        a, b = (factors[adapter].weight.float() for factors in (self.lora_A, self.lora_B))
        a, b = a.detach().reshape(self.num_experts, -1, a.shape[1]), b.reshape(b.shape[0], -1, self.num_experts)
        order = "eoi" if self._did_swap_in_out_features else "eio"
        return (torch.einsum(f"ore,eri->{order}", b, a) * self.scaling[adapter]).to(self.get_param())


KINDS: dict[type, type] = {
    lora.Linear: LoraLinear,
    lora.Embedding: LoraEmbedding,
    Conv1d: LoraConv1d,
    Conv2d: LoraConv2d,
    Conv3d: LoraConv3d,
    PeftAttention: MultiheadAttention,
    lora.ParamWrapper: ParamWrapper,
}

if is_bnb_available():

    class LoraLinear8bitLt(_Residual, lora.Linear8bitLt):  # type: ignore[misc]
        """On an 8-bit weight of bitsandbytes."""

        replaces = lora.Linear8bitLt

    KINDS[lora.Linear8bitLt] = LoraLinear8bitLt

if is_bnb_4bit_available():

    class LoraLinear4bit(_Residual, lora.Linear4bit):  # type: ignore[misc]
        """On a 4-bit weight of bitsandbytes."""

        replaces = lora.Linear4bit

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            """The fused path where it is on, the layer is eligible and only `x` is passed (mixed batches and variants
            pass more).
            """
            y = None if args or any(value is not None for value in kwargs.values()) else fused.forward(self, x)
            return super().forward(x, *args, **kwargs) if y is None else y

    KINDS[lora.Linear4bit] = LoraLinear4bit


REQUANTIZED = ("TorchaoLoraLinear", "HqqLoraLinear")
"""PEFT's layers that merge by quantizing again; PEFT defines them where their library is installed."""


def _blind_product(layer: Any, adapter: str) -> Tensor:
    """`s B A` with a frozen A, which takes no gradient. In fp32 if either is: rounded, A would leak."""
    a, b = layer.lora_A[adapter].weight.detach(), layer.lora_B[adapter].weight
    dtype = torch.promote_types(a.dtype, b.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    product: Tensor = b.to(wide) @ a.to(wide) * layer.scaling[adapter]
    return product.to(dtype)


def refuse_lossy_merge(layer: Any, adapter: str, name: str) -> None:
    """Merging into a k-bit weight rounds most of the update away, and the rest leaks."""
    base = layer.get_base_layer()
    if base_weights.split_dimension(base) is not None:
        raise UnsupportedLayerError(
            f"{name}: tensor parallelism splits this {type(base).__name__} {base_weights.shape(base)}, and the update "
            "cannot be merged part by part. Save the adapter, load the base in one process, and merge there."
        )
    kind = base_weights.quantization(base)
    if not kinds.merges_exactly(base):
        raise LossyMergeError(
            f"{name}: a {type(base).__name__} with padding_mode={base.padding_mode!r} cannot be merged into: PEFT's "
            "lora_A is padded by zeros, and the merged weight would see other patches. Keep the adapter beside it."
        )
    if kind == "packed":
        raise LossyMergeError(
            f"{name}: a {type(base).__name__} {base_weights.shape(base)} cannot be merged into: its weight cannot be "
            "read. Keep the adapter beside the base."
        )
    if kind is not None:
        error = base_weights.merge_error(base, layer.get_delta_weight(adapter), name)
        size = "" if math.isnan(error) else f" by {error:.1%} of its norm"
        raise LossyMergeError(
            f"{name}: merging into a {kind} weight would miss the update of adapter {adapter!r}{size}, and the error "
            "reaches into the protected subspace. Keep the adapter beside the base, or merge into dequantized weights "
            "with peft_safety.merge_quantized(model)."
        )


def adopt(layer: nn.Module) -> None:
    """Make one of PEFT's layers the subclass of its kind."""
    kind = type(layer)
    if kind.__name__ in REQUANTIZED and kind not in KINDS and not issubclass(kind, _Residual):
        KINDS[kind] = type(kind.__name__, (_Residual, kind), {"replaces": kind})
    layer.__class__ = KINDS.get(kind, kind)
