"""One rank of a distributed run: trains a protected tiny model and prints, as JSON on rank 0, what its factors leak.

python -m tests.distributed.worker RANK WORLD FILE HOW METHOD
"""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist
from torch import nn

from peft_safety.layers import protected_leaves
from peft_safety.projection import leak
from tests.peft import cells
from tests.peft.patch_cells import patched
from tests.peft.test_guardspace import guarded

STEPS = 5


def build(method: str) -> nn.Module:
    """The same on every rank."""
    torch.manual_seed(0)
    if method.startswith("guardspace"):
        return guarded(init="guardspace" if method.endswith("residual") else "lora")
    return cells.protected() if method == "salora" else patched(side=method)


def train(model: nn.Module, rank: int, world: int) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for step in range(STEPS):
        ids = cells.tokens(rows=6, seed=step)[rank::world]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def main(rank: int, world: int, meeting: str, how: str, method: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    model = build(method)
    inner = model
    if how == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (world,))
        for layer in model.base_model.model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif how == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    train(model, rank, world)
    worst, total, sharded = 0.0, 0.0, 0
    for _, leaf in protected_leaves(inner):
        raw = leaf.raw().detach()
        sharded += hasattr(raw, "full_tensor")
        whole = raw.full_tensor() if hasattr(raw, "full_tensor") else raw
        if leaf.basis is not None:
            worst, total = max(worst, leak(leaf.basis, whole, leaf.side)), total + float(whole.abs().sum())
    if rank == 0:
        print(json.dumps({"leak": worst, "sum": total, "sharded": sharded}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
