"""An adapter's factors as files hold them: projected, whole, and in fp32 where they are constrained."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peft_safety.core import projection
from peft_safety.core.names import own_name
from peft_safety.core.projection import Side
from peft_safety.errors import ProtectionError
from peft_safety.layers.frozen_linear import FrozenLinear
from peft_safety.layers.layout import lay_out
from peft_safety.layers.protected_linear import ProtectedLinear, fold_rows, is_here, is_whole


@torch.no_grad()
def folded_state(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict with the factors of all leaves as they are saved (see `saved`); neither the model nor `state`
    changes. FSDP and ZeRO keep a leaf from folding in place: what they gather is folded here. A factor that is not
    whole is a ProtectionError.
    """
    result = dict(state)
    for name, leaf in model.named_modules():
        if not isinstance(leaf, (ProtectedLinear, FrozenLinear)):
            continue
        basis, side = (leaf.basis, leaf.side) if isinstance(leaf, ProtectedLinear) else (None, "in")
        for kind in ("weight", "initial"):
            key = f"{own_name(name)}.{kind}"  # torch's state dicts leave out what its wrappers add to names
            if key not in result:
                if isinstance(leaf, FrozenLinear) and kind == "weight" and hasattr(leaf.weight, "ds_id"):
                    result[key] = _copied(leaf, key)
                continue
            factor = result[key]
            if not (is_here(factor) if basis is None else is_whole(factor, basis, side)):
                raise ProtectionError(
                    f"{key} {tuple(factor.shape)} is a shard or on the meta device. Pass save_pretrained the gathered "
                    "weights: state_dict=get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, "
                    "cpu_offload=True)); with ZeRO-3 those inside deepspeed.zero.GatheredParameters(parameters)."
                )
            if basis is not None:
                result[key] = saved(basis, factor, side)
    return result


def _copied(leaf: FrozenLinear, key: str) -> Tensor:
    if leaf.whole is None:
        raise ProtectionError(
            f"{key} is frozen, and under ZeRO-3 transformers saves trained weights only. Use ZeRO-2, FSDP2 or "
            "`peft-safety train`, or pass save_pretrained weights gathered in deepspeed.zero.GatheredParameters."
        )
    return leaf.whole


@torch.no_grad()
def saved(basis: Tensor, factor: Tensor, side: Side) -> Tensor:
    """A copy of a constrained factor, folded, in fp32 or better: rounded to the 16 bits that TRL trains in on a
    quantized base, it would leak 1e-3.
    """
    wide = factor.detach().to(torch.promote_types(factor.dtype, torch.float32), copy=True)
    fold_rows(basis.to(factor.device), wide, side)
    return wide


def joined(a: Tensor, b: Tensor, a0: Tensor | None, b0: Tensor | None) -> tuple[Tensor, Tensor]:
    """`A' = [A; A0] (r', n)` and `B' = [B, -B0] (m, r')`: `B' A' = B A - B0 A0`. Without a residual, A and B."""
    if a0 is None or b0 is None:
        return a, b
    return torch.cat([a, a0.to(a)]), torch.cat([b, -b0.to(b)], dim=1)


def stored_factors(leaf_a: nn.Module, leaf_b: nn.Module) -> tuple[Tensor, Tensor]:
    """The `joined` factors in the leaves of a LoRA layer as matrices, folded, not differentiable; of plain LoRA its
    weights. A constrained one in 16 bits is given in fp32, see `saved`.
    """
    (a, a0), (b, b0) = _stored(leaf_a), _stored(leaf_b)
    return joined(a.flatten(1), b.flatten(1), a0, b0)


def _stored(leaf: nn.Module) -> tuple[Tensor, Tensor | None]:
    weight: Tensor = leaf.weight.detach()  # type: ignore[assignment, operator]  # reading folds, the frozen factor too
    if not isinstance(leaf, ProtectedLinear):
        return weight, None
    if leaf.basis is None or not is_half(leaf):
        return weight, leaf.initial
    initial = None if leaf.initial is None else saved(leaf.basis, leaf.initial, leaf.side)
    return saved(leaf.basis, weight, leaf.side), initial


def is_half(leaf: ProtectedLinear) -> bool:
    """Whether a factor is held in 16 bits."""
    return leaf.raw().dtype in projection.HALF


def lay_out_adapter(model: nn.Module, adapter_name: str, leak: float = math.inf) -> None:
    """Move what an adapter holds (factors, modules saved with them) to where new tensors would lie, and fold it unless
    no factor has more than this leak and that is little enough.
    """
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == adapter_name:
            for part in module.modules():
                lay_out(part)
                if isinstance(part, ProtectedLinear) and leak > projection.fold_tolerance(part.raw().dtype):
                    part.fold()
