"""Training runs on a 4-bit base, as a process of its own: Triton decides at its import whether it interprets. Prints
JSON.

PEFT_SAFETY_FUSED=1 PEFT_SAFETY_BACKEND=triton TRITON_INTERPRET=1 python -m tests.peft.fused_runs STEPS
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from peft_safety import explain_dispatch
from tests.peft import cells
from tests.peft.guard_cells import guarded

ARMS = ("salora", "salora-residual", "guardspace", "dropout")


def build(arm: str) -> Any:
    cells.base_model(cells.WIDE)  # made once, from random numbers that the adapter must not miss
    torch.manual_seed(0)
    if arm == "guardspace":
        return guarded(cells.WIDE).train()
    options = {"lora_dropout": 0.3} if arm == "dropout" else {}
    return cells.protected(cells.WIDE, "task" if arm == "salora-residual" else "lora", **options).train()


def losses(arm: str, steps: int, rows: int = 8) -> list[float]:
    """Losses of a run; batches alternate between few rows and many."""
    model = build(arm)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    found = []
    for step in range(steps):
        torch.manual_seed(step)  # dropout's masks
        ids = cells.tokens(rows=rows if step % 2 else 2, seed=step % 8)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def main(steps: int) -> None:
    print(
        json.dumps(
            {
                "paths": sorted({row.path for row in explain_dispatch(build("salora"))}),
                **{arm: losses(arm, steps) for arm in ARMS},
            }
        )
    )


if __name__ == "__main__":
    main(int(sys.argv[1]))
