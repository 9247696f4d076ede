"""Distributed runs: each trains a protected tiny model in processes of its own, and its rank 0 prints, as one line of
JSON, what its factors leak.

python -m tests.distributed.worker FOLDER METHOD [alone ddp fsdp2 zero2 zero3]

The ranks are forked, so that nothing is imported twice (a decomposition of LAPACK hangs in a forked process: those of
a residual, a frozen A and a window are new ones), and meet in a file of the folder: a port that is free now may be
another process's a moment later. What is measured is the saved adapter: of shards, gathered as accelerate gathers
them.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from peft_safety import assert_protected, verify
from peft_safety.core.projection import leak
from peft_safety.errors import ProtectionError
from peft_safety.layers import protected_leaves
from tests.peft import cells
from tests.peft.frozen_cells import copies, frozen, windowed
from tests.peft.guard_cells import guarded, subspace
from tests.peft.patch_cells import patched

STEPS = 5
USUAL = ("alone", "ddp", "fsdp2")
"""How a run is distributed; "zero2" and "zero3" need DeepSpeed. All but the first take two processes."""
SMALL = {"frozen": frozen, "window": windowed}
"""The forms that are blind without bases: what they save is measured against the null space itself."""


def build(method: str) -> PeftModel:
    """The same on every rank."""
    torch.manual_seed(0)
    if method in SMALL:
        return SMALL[method]()
    if method.startswith("guardspace"):
        return guarded(init="guardspace" if method.endswith("residual") else "lora")
    return cells.protected() if method == "salora" else patched(side=method)


def train(model: Any, rank: int, world: int, engine: Any = None) -> None:
    optimizer = adamw(model) if engine is None else None
    for step in range(STEPS):
        ids = cells.tokens(rows=6, seed=step)[rank::world]
        loss = (engine or model)(input_ids=ids, labels=ids).loss
        if optimizer is None:
            engine.backward(loss)
            engine.step()
        else:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def adamw(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)


def engine_of(model: PeftModel, stage: int) -> Any:
    """DeepSpeed's, on the CPU."""
    import deepspeed

    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled for minutes
    config = {
        "train_micro_batch_size_per_gpu": 3,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    return deepspeed.initialize(model=model, optimizer=adamw(model), config=config)[0]


def gathered(model: PeftModel, how: str) -> dict[str, Any]:
    if how == "zero3":
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            return {name: value.detach().clone() for name, value in model.state_dict().items()}
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def saved(model: PeftModel, state: dict[str, Any] | None, small: bool) -> dict[str, Tensor]:
    """What the file holds; shards that nobody gathered are refused. With `small` it is verified and loaded, too."""
    with tempfile.TemporaryDirectory() as folder:
        if state is not None:
            with pytest.raises(ProtectionError, match="gathered"):
                model.save_pretrained(folder)
        model.save_pretrained(folder, state_dict=state)
        if small:
            space = subspace(cells.base_model())
            assert verify(folder, cells.base_model(), space).blindness_checked
            assert_protected(PeftModel.from_pretrained(cells.base_model(), folder))
        return {name: value.clone() for name, value in load_file(Path(folder, "adapter_model.safetensors")).items()}


def run(rank: int, world: int, folder: str, how: str, method: str) -> None:
    """One rank."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/{how}", rank=rank, world_size=world)
    inner = build(method)
    model: Any = inner
    before = copies(inner)
    if how == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (world,))
        for layer in model.base_model.model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif how == "ddp":
        model = torch.nn.parallel.DistributedDataParallel(model)
    engine = engine_of(inner, int(how[-1])) if how.startswith("zero") else None
    train(model, rank, world, engine)
    sharded = sum(hasattr(p, "full_tensor") or hasattr(p, "ds_tensor") for p in inner.parameters())
    state = gathered(inner, how) if sharded else None
    if rank == 0:
        stored = saved(inner, state, method in SMALL)
        worst, total = 0.0, 0.0
        space = subspace(cells.base_model()) if method in SMALL else None
        for name, a in before.items() if space else ():
            now = stored[f"{name}.lora_A.weight"]
            worst = max(worst, leak(space.bases[cells.canonical(name)]["in"], now, "in"))
            total += float(stored[f"{name}.lora_B.weight"].abs().sum())
            assert torch.equal(now, a) == (method == "frozen"), name
        for name, leaf in protected_leaves(inner):
            if leaf.basis is not None and space is None:
                factor = stored[f"{name.removesuffix('.default')}.weight"]
                worst, total = max(worst, leak(leaf.basis, factor, leaf.side)), total + float(factor.abs().sum())
        print(json.dumps({"how": how, "leak": worst, "sum": total, "sharded": sharded}), flush=True)
    del model  # a reducer ends before its group, and all ranks' groups together: else gloo may wait for ever
    dist.barrier()
    dist.destroy_process_group()


def main(folder: str, method: str, *hows: str) -> None:
    torch.set_num_threads(1)
    kind = "spawn" if hows or "residual" in method or method in SMALL else "fork"
    for how in hows or USUAL:
        world = 1 if how == "alone" else 2
        torch.multiprocessing.start_processes(run, (world, folder, how, method), nprocs=world, start_method=kind)


if __name__ == "__main__":
    main(*sys.argv[1:])
