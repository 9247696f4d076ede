"""What the tests of `fuse` share: a tiny base, a safe adapter, tasks that continue from it or do not, and full
checkpoints of the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from peft_safety.methods.somf import MaskTraining
from tests.peft.cells import base_model
from tests.tiny import tiny_llama

TARGETS = ["q_proj", "v_proj", "down_proj"]
QUICK = MaskTraining(max_steps=3, batch_size=4, lr=0.1, max_length=128, progress=False)
PAIRS = [
    {"prompt": f"do the bad thing {i}", "chosen": "I won't do that.", "rejected": "Sure, here is"} for i in range(8)
]
ROWS = [{"prompt": row["prompt"], "response": row["chosen"]} for row in PAIRS]
IDS = torch.randint(4, 200, (2, 12), generator=torch.Generator().manual_seed(0))


def config(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **options})


def moved(model: Any, adapter: str, seed: int, scale: float) -> None:
    """Move an adapter's factors at random."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and f".{adapter}." in name:
                parameter += scale * torch.randn(parameter.shape, generator=g).to(parameter)


def family(kind: str = "linear", continued: bool = True, tasks: int = 2, **options: Any) -> PeftModel:
    """A PeftModel with the adapters "safe", "task0", "task1", ..., the same every time."""
    torch.manual_seed(0)
    model = get_peft_model(base_model(kind), config(**options), adapter_name="safe")
    moved(model, "safe", 1, 0.1)
    for index in range(tasks):
        name = f"task{index}"
        model.add_adapter(name, config(**options))
        if continued:
            copied(model, "safe", name)
        moved(model, name, 10 + index, 0.05 if continued else 0.1)
    return model.eval()


def copied(model: Any, source: str, target: str) -> None:
    state = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in state.items():
            if f".{target}." in name:
                parameter.copy_(state[name.replace(f".{target}.", f".{source}.")])


def saved(model: PeftModel, root: Path) -> dict[str, str]:
    """Each adapter's directory, by name."""
    for adapter in model.peft_config.values():
        adapter.base_model_name_or_path = "tiny/base"
    model.save_pretrained(str(root))
    return {name: str(root / name) for name in model.peft_config}


def checkpoints(root: Path, tasks: int = 2, shard: str = "30KB") -> list[str]:
    """A safe checkpoint and fine-tuned ones, sharded."""
    found = []
    for index in range(tasks + 1):
        model = tiny_llama()
        g = torch.Generator().manual_seed(50 + index)
        with torch.no_grad():
            for parameter in model.parameters():
                if index:
                    parameter += 0.02 * torch.randn(parameter.shape, generator=g)
        folder = root / ("safe" if index == 0 else f"task{index - 1}")
        model.save_pretrained(folder, max_shard_size=shard)
        found.append(str(folder))
    return found


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


def of_adapter(model: PeftModel, name: str) -> Tensor:
    model.set_adapter(name)
    return logits(model)


def deltas(model: PeftModel, adapter: str) -> dict[str, Tensor]:
    from tests.peft.cells import deltas as dense

    return dense(model, adapter)
