"""A small network whose modules have difficult names, and protected adapters on it."""

import torch
from peft import get_peft_model
from torch import nn

from peft_safety import SafetySubspace, SaLoRAConfig
from peft_safety.core.targets import base_layers

WIDTH = 16


class Net(nn.Module):
    """Linear layers one after another, under any names: {"enc.lin": ..., "head": ...}."""

    def __init__(self, *names, seed=0):
        super().__init__()
        self.order = names
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for name in names:
                *parents, last = name.split(".")
                place = self
                for part in parents:
                    if part not in dict(place.named_children()):
                        place.add_module(part, nn.Module())
                    place = place.get_submodule(part)
                place.add_module(last, nn.Linear(WIDTH, WIDTH))

    def forward(self, x):
        for name in self.order:
            x = x + torch.tanh(self.get_submodule(name)(x))
        return x


def inputs(seed=0):
    return torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(seed))


def output(model):
    with torch.no_grad():
        return model.eval()(inputs())


def train(model, steps=3):
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for step in range(steps):
        model(inputs(step + 1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def random_subspace(model, names):
    layers = base_layers(model)
    generator = torch.Generator().manual_seed(1)
    bases = {
        n: {"out": torch.linalg.qr(torch.randn(layers[n].weight.shape[0], 3, generator=generator)).Q.contiguous()}
        for n in names
    }
    return SafetySubspace(bases)


def protected(model, names, **options):
    return train(get_peft_model(model, SaLoRAConfig(r=4, subspace=random_subspace(model, names), **options)))
