"""`fuse` without a mask, against PEFT's `add_weighted_adapter`."""

from __future__ import annotations

import torch

from peft_safety import fuse
from tests.peft.fusion_cells import config, deltas, family

TASKS = ["task0", "task1"]


def add_task_vectors(model):
    """Adapters whose factors are the task vectors against the safe one, so that PEFT adds what we add."""
    for name in TASKS:
        model.add_adapter(f"{name}_vector", config())
    state = dict(model.named_parameters())
    with torch.no_grad():
        for key, parameter in state.items():
            for name in TASKS:
                if f".{name}_vector." in key:
                    task, safe = (state[key.replace(f"{name}_vector", other)] for other in (name, "safe"))
                    parameter.copy_(task - safe)


def test_task_vectors_of_factors_as_peft_adds_them():
    model = family()
    add_task_vectors(model)
    report = fuse("safe", TASKS, model=model, adapter_name="fused", method="task_arithmetic", weights=0.7)
    assert report.facts["layout"] == "continued"
    scaling = 2.0  # PEFT multiplies each factor by sqrt(weight * scaling)
    vectors = [f"{name}_vector" for name in TASKS]
    model.add_weighted_adapter(vectors, [0.7**2 / scaling] * 2, "theirs", combination_type="linear")
    parameters = dict(model.named_parameters())
    theirs = [key for key in parameters if ".theirs." in key and "lora_" in key]
    assert len(theirs) == 12
    for key in theirs:
        safe, factor = (parameters[key.replace(".theirs.", f".{name}.")] for name in ("safe", "fused"))
        scale = scaling if "lora_B" in key else 1.0
        torch.testing.assert_close(factor - scale * safe, scale * parameters[key], rtol=1e-4, atol=1e-6)


def test_independent_adapters_as_peft_concatenates_them():
    model = family(continued=False)
    fuse(None, TASKS, model=model, adapter_name="fused", method="task_arithmetic", weights=0.7)
    model.add_weighted_adapter(TASKS, [0.7] * 2, "theirs", combination_type="cat")
    ours, theirs = deltas(model, "fused"), deltas(model, "theirs")
    assert ours.keys() == theirs.keys()
    for name, found in ours.items():
        torch.testing.assert_close(found, theirs[name], rtol=1e-3, atol=1e-5)
