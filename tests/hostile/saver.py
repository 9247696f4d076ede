"""Small protected adapters, and a process that saves some in turn into one directory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from peft_safety import SafetySubspace, SaLoRAConfig

WIDTH = 32


class Small(nn.Module):
    """Two layers, the same in every process."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.second = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))
        for layer in (self.first, self.second):
            layer.weight.data = torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x))
        return y


def adapter(seed: int) -> PeftModel:
    """Other bases, factors and scaling for every seed."""
    torch.manual_seed(seed)
    bases = {name: {"out": torch.linalg.qr(torch.randn(WIDTH, 4)).Q} for name in ("first", "second")}
    config = SaLoRAConfig(
        r=4, lora_alpha=8 * (seed + 1), subspace=SafetySubspace(bases), target_modules=["first", "second"]
    )
    model = get_peft_model(Small(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return model.eval()


@contextmanager
def saving(directory: Path, models: Sequence[PeftModel]) -> Iterator[None]:
    """Another process saves the models in turn, until the block ends."""
    stop = directory.parent / "stop"
    child = os.fork()
    if child == 0:
        code = 1
        try:
            while not stop.exists():
                for model in models:
                    model.save_pretrained(str(directory))
            code = 0
        finally:
            os._exit(code)
    try:
        yield
    finally:
        stop.touch()
        _, status = os.waitpid(child, 0)
    assert status == 0
