"""A `lora_A` that nothing trains: with `A Q = 0`, the update `s B A` is zero on the span of `Q`, whatever `B` is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from peft_safety.core.certificate import FrozenFactor
from peft_safety.errors import ProtectionError
from peft_safety.layers.convolution import Convolution, Factor, product, sizes

if TYPE_CHECKING:  # importing PEFT registers the methods, which import this module
    from peft.tuners.lora import LoraLayer


class FrozenLinear(Factor):
    """`lora_A` with a weight `(r, in_features)` that takes no gradient; see LoRA-FA, arXiv 2308.03303. The product is
    in the dtype of the trained factor `behind` it, which alone PEFT and TRL cast. On a `convolution`, the weight is
    `(r, channels, *kernel)`.
    """

    behind: tuple[nn.ModuleDict, str]
    whole: Tensor | None = None
    """A copy to save: under ZeRO-3 the weight is in shards, and transformers saves trained weights only."""

    @classmethod
    def replacing(cls, linear: nn.Module, behind: nn.ModuleDict, adapter_name: str) -> FrozenLinear:
        weight: nn.Parameter = linear._parameters["weight"]  # type: ignore[assignment]
        leaf = cls(*sizes(linear), bias=False, device="meta")
        leaf.weight = weight.requires_grad_(False)
        leaf.training, leaf.behind = linear.training, (behind, adapter_name)
        leaf.convolution = Convolution.of(linear)
        return leaf

    def reset_parameters(self) -> None:
        """Nothing: the weight is PEFT's, which initializes it."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.detach()  # no flag, optimizer or hook can train it
        if torch.is_autocast_enabled(x.device.type):
            return product(self.convolution, x, weight)
        y = product(self.convolution, x.to(weight.dtype), weight)  # PEFT's own cast of the inputs can be switched off
        factors, name = self.behind
        trained = next(factors[name].parameters(), None) if name in factors else None
        return y if trained is None else y.to(trained.dtype)


@torch.no_grad()
def freeze(layer: LoraLayer, adapter_name: str, a: Tensor) -> None:
    """Give a LoRA layer a frozen `lora_A`: `a (r', n)` with `r' <= r`, and zero rows. fp32 stays fp32, also on a
    half-precision base: rounded to bf16 it would reach 1e-3 of its norm into the span that it avoids.
    """
    factor = layer.lora_A[adapter_name]
    weight = factor._parameters["weight"]
    dtype = torch.promote_types(weight.dtype, a.dtype)
    if weight.is_meta:
        value = torch.zeros(weight.shape, dtype=dtype, device="meta")
    else:
        value = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
        value.flatten(1)[: a.shape[0]].copy_(a)
    weight.data = value
    if not isinstance(factor, FrozenLinear):
        layer.lora_A[adapter_name] = FrozenLinear.replacing(factor, layer.lora_B, adapter_name)
    # PEFT's own list of what stays frozen; its dict belongs to the class until it is replaced
    layer.frozen_peft_weight_names = {**layer.frozen_peft_weight_names, adapter_name: ("lora_A",)}


def check_frozen(factor: nn.Module, name: str, certified: FrozenFactor | None) -> None:
    """A ProtectionError refuses a factor that is not the frozen one. Shards and meta tensors are checked on saving."""
    if not isinstance(factor, FrozenLinear):
        raise ProtectionError(
            f"{name}: a {type(factor).__name__} stands where the frozen lora_A belongs. Load the adapter again."
        )
    check_certified_rows(factor.weight, name, certified)


def check_certified_rows(weight: Tensor, name: str, certified: FrozenFactor | None) -> None:
    """The same for its weight."""
    if weight.is_meta or hasattr(weight, "device_mesh") or weight.ndim < 2:
        return
    if certified is None or certified.precision(weight.flatten(1)) is None:
        raise ProtectionError(
            f"{name}: lora_A {tuple(weight.shape)} has changed, and may see protected inputs. Load the adapter again."
        )
