"""Folding after optimizer steps: the leaves of equal shape together, in a few batched calls whatever their number;
shards on their own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from peft_safety import projection
from peft_safety.errors import ProtectionError
from peft_safety.layers.leaf import ProtectedLinear, is_plain, live_leaves
from peft_safety.layers.sharing import moved
from peft_safety.projection import Side

MAX_GROUP_BYTES = 256 << 20
"""Working memory of one batched fold: both groups of a 7B model's linear layers at r = 16 and k = 32 stay below it
(130 MiB each).
"""
LOW_PRECISION_PASSES = 2
"""Where matrix products are allowed in TF32 or bf16, one pass leaves 1e-4 of what it removes; a second one leaves 1e-4
of that.
"""


@torch.no_grad()
def fold_together(leaves: Iterable[ProtectedLinear], batched: bool | None = None) -> None:
    """Project the weights of leaves in place, unconditionally and without a host synchronization: leaves of equal (d,
    k, r, side, dtype, device) at once.

    Sharded weights (DTensor) are projected one by one, on their local shards. Weights on the meta device, and such as
    a sharding wrapper has flattened, are left alone.

    Args:
        batched: few calls on stacked copies, or one leaf after another in place. Default: batched except on a CPU,
            which has no launches to save, and where the copies cost two to three times what they save
            (benchmarks/grouped.py).
    """
    groups: dict[tuple[Any, ...], list[ProtectedLinear]] = defaultdict(list)
    for leaf in leaves:
        weight = leaf.raw()
        if leaf.basis is None:
            continue
        if hasattr(weight, "device_mesh"):
            fold_shard(weight, leaf.basis, leaf.side)
        elif is_plain(weight, leaf.basis, leaf.side):
            groups[leaf.side, tuple(weight.shape), leaf.basis.shape[1], weight.dtype, weight.device].append(leaf)
    passes = 1 if _full_precision() else LOW_PRECISION_PASSES
    for (side, *_, device), group in groups.items():
        with torch.autocast(device_type=device.type, enabled=False):
            for part in (
                _chunks(group)
                if (device.type != "cpu" if batched is None else batched)
                else ([leaf] for leaf in group)
            ):
                weights = [leaf.raw() for leaf in part]
                bases = [moved(leaf.basis, device) for leaf in part]  # type: ignore[arg-type]
                _fold_stack(weights, bases, side, passes) if len(part) > 1 else _fold_one(
                    weights[0], bases[0], side, passes
                )
                for leaf in part:
                    leaf.mark_folded("weight", stepped=True)


def _chunks(group: list[ProtectedLinear]) -> Iterator[list[ProtectedLinear]]:
    """Parts of a group whose working memory is bounded."""
    columns = group[0].basis.shape[1] + 2 * min(group[0].raw().shape)  # type: ignore[union-attr]
    size = max(1, MAX_GROUP_BYTES // (4 * columns * max(group[0].raw().shape)))
    return (group[i : i + size] for i in range(0, len(group), size))


def _fold_stack(weights: list[Tensor], bases: list[Tensor], side: Side, passes: int) -> None:
    wide = torch.promote_types(bases[0].dtype, weights[0].dtype)
    u, w = torch.stack(bases).to(wide), torch.stack(weights).to(wide)
    for _ in range(passes):
        w = torch.baddbmm(w, u, u.mT @ w, alpha=-1) if side == "out" else torch.baddbmm(w, w @ u, u.mT, alpha=-1)
    torch._foreach_copy_(weights, list(w.unbind()))


def _fold_one(weight: Tensor, basis: Tensor, side: Side, passes: int) -> None:
    wide = torch.promote_types(basis.dtype, weight.dtype)
    u, w = basis.to(wide), weight.to(wide)
    for _ in range(passes):
        w.addmm_(*((u, u.mT @ w) if side == "out" else (w @ u, u.mT)), alpha=-1)
    if w is not weight:
        weight.copy_(w)


def _full_precision() -> bool:
    """Whether fp32 matrix products are computed in fp32 on every device."""
    found = [
        getattr(backend.matmul, "fp32_precision", None)
        for backend in (torch.backends.cuda, torch.backends.mkldnn)
        if hasattr(backend, "matmul")
    ]
    if None in found or not found:  # torch before 2.9
        return torch.get_float32_matmul_precision() == "highest"
    return all(precision in ("none", "ieee") for precision in found)


def fold_shard(weight: Any, basis: Tensor, side: Side) -> None:
    """Fold one shard of a DTensor that is split along its first dimension: one all-reduce of `k x r`, and only for the
    output side.
    """
    from torch.distributed._functional_collectives import all_reduce
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    local: Tensor = weight.to_local()
    placements = list(weight.placements)
    if any(not p.is_replicate() and p != Shard(0) for p in placements):
        raise ProtectionError(
            f"a protected factor is sharded as {placements}; only Shard(0) is supported. Keep adapters replicated, or "
            "shard them by FSDP2's default."
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


def _after_optimizer_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Fold what this optimizer has just moved. Leaves are taken in the order of its parameters, which all ranks
    share.
    """
    by_weight = {id(leaf._parameters.get("weight")): leaf for leaf in live_leaves()}
    moving = (
        p
        for group in optimizer.param_groups
        if not _stands_still(group)
        for p in group["params"]
        if p.grad is not None
    )
    fold_together(by_weight[id(p)] for p in moving if id(p) in by_weight)


def _stands_still(group: dict[str, Any]) -> bool:
    """Whether a step has moved nothing because its rate is 0. torch's distributed checkpoints load optimizer states
    behind such a step, and projecting once more would change the last bits of what they have just restored."""
    lr: Any = group.get("lr")
    on_host = isinstance(lr, (int, float)) or (isinstance(lr, Tensor) and lr.device.type == "cpu")
    return on_host and float(lr) == 0


register_optimizer_step_post_hook(_after_optimizer_step)
