"""Adapters with a frozen, blind `lora_A`, or one in a window, on the tiny models."""

import pytest
import torch
from peft import get_peft_model
from peft.tuners.lora import LoraLayer

from peft_safety import assert_protected
from tests.peft import cells
from tests.peft.guard_cells import TASK, batches, config, subspace


def muon(parameters):
    if not hasattr(torch.optim, "Muon"):
        pytest.skip(f"torch {torch.__version__} has no Muon")
    return torch.optim.Muon(parameters, lr=1e-2)


M = 8
"""Directions of the windows, fewer than the complement has."""
OPTIMIZERS = {
    "adamw": cells.adamw,
    "adamw8bit": cells.adamw8bit,
    "sgd": lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9),
    "muon": muon,
}


def frozen(kind="linear", *, seed=0, **options):
    """A model under a fresh one. The rows of A come from the task, unless `a_init` says otherwise."""
    space = options.pop("space", None) or subspace(cells.base_model(kind), kind=kind)
    torch.manual_seed(seed)
    data = {} if options.get("a_init") == "random" else {"task_data": batches(TASK)}
    return get_peft_model(cells.base_model(kind), config(space, kind, train="B", **{**data, **options}))


def windowed(kind="linear", *, seed=0, trained=False, **options):
    """A fresh model with an adapter in windows of the task's directions, unless `a_init` says otherwise."""
    space = options.pop("space", None) or subspace(cells.base_model(kind), kind=kind)
    torch.manual_seed(seed)
    data = {} if options.get("a_init") == "random" else {"task_data": batches(TASK)}
    own = config(space, kind, train="window", **{"window": M, **data, **options})
    model = get_peft_model(cells.base_model(kind), own)
    return cells.perturb(model, seed) if trained else model.eval()


def lora_a(model, adapter="default"):
    """The weights of `lora_A` by layer."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer) and adapter in m.lora_A}
    return {name: layer.lora_A[adapter].weight for name, layer in layers.items()}


def copies(model):
    """`lora_a`, not shared with the model."""
    return {name: weight.detach().clone() for name, weight in lora_a(model).items()}


def assert_frozen(model, before):
    """No bit of any `lora_A` has changed, and none of them trains."""
    now = lora_a(model)
    assert now.keys() == before.keys()
    for name, weight in now.items():
        assert torch.equal(weight, before[name]), name
        assert not weight.requires_grad, name
    assert_protected(model)
