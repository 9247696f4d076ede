"""Training with an anchor and a canary, in one process and in two under DDP: every rank prints what it ends with.

python -m tests.distributed.anchor FOLDER
"""

from __future__ import annotations

import hashlib
import json
import sys
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from transformers import TrainerControl

from peft_safety import CanaryCallback, SafetyAnchorCallback
from peft_safety.data.chat import Collator, encode_rows
from tests.peft.anchored import REFUSALS, REQUESTS, TASK, TOKENIZER, refusing, tuned

STEPS = 6


def run(rank: int, world: int, folder: str) -> None:
    """One rank."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/{world}", rank=rank, world_size=world)
    inner = tuned().train()
    model: Any = torch.nn.parallel.DistributedDataParallel(inner)
    optimizer = torch.optim.SGD([p for p in inner.parameters() if p.requires_grad], lr=0.1)
    state = SimpleNamespace(global_step=0, max_steps=STEPS, log_history=[])
    given: dict[str, Any] = {"model": inner, "optimizer": optimizer}
    anchor = SafetyAnchorCallback(TOKENIZER, REFUSALS, rows=3, every=2)
    canary = CanaryCallback(TOKENIZER, REQUESTS, {"bare": "{}"}, every=3)
    for callback in (anchor, canary):
        callback.on_train_begin(SimpleNamespace(fp16=False), state, None, **given)  # type: ignore[arg-type]
    rows = encode_rows(TOKENIZER, [row for row in TASK if row["prompt"].startswith("tell")], 128)
    for _ in range(STEPS):
        model(**Collator(TOKENIZER)(rows[rank::world])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        state.global_step += 1
        canary.on_step_end(None, state, TrainerControl(), **given)  # type: ignore[arg-type]
    factors = [p.detach() for p in inner.parameters() if p.requires_grad]
    bits = hashlib.sha256(b"".join(p.numpy().tobytes() for p in factors)).hexdigest()
    total = float(sum(p.abs().sum() for p in factors))
    found = {"world": world, "bits": bits, "sum": total, "kl": anchor._pending[-1][0], "looks": canary.looks}
    print(json.dumps(found) + "\n", end="", flush=True)  # in one piece: both ranks print
    del model  # its reducer ends before its group, and both ranks' groups together: else gloo may wait for ever
    dist.barrier()
    dist.destroy_process_group()


def main(folder: str) -> None:
    torch.set_num_threads(1)
    refusing()  # taught once, before the ranks are forked
    for world in (1, 2):
        torch.multiprocessing.start_processes(run, (world, folder), nprocs=world, start_method="fork")


if __name__ == "__main__":
    main(sys.argv[1])
