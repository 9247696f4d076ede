"""`fuse` without learning, against PEFT's `add_weighted_adapter` where that has the same method."""

from __future__ import annotations

import pytest
import torch

from peft_safety import fuse
from tests.peft.fusion_cells import config, deltas, family

TASKS = ["task0", "task1"]


def zero_safe(model):
    """Adapters whose factors are their task vectors against the safe one, so that PEFT's methods see what ours see."""
    state = dict(model.named_parameters())
    for name in TASKS:
        model.add_adapter(f"{name}_vector", config())
    state = dict(model.named_parameters())
    with torch.no_grad():
        for key, parameter in state.items():
            for name in TASKS:
                if f".{name}_vector." in key:
                    parameter.copy_(
                        state[key.replace(f"{name}_vector", name)] - state[key.replace(f"{name}_vector", "safe")]
                    )
    return model


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"method": "task_arithmetic", "weights": 0.7}, {"combination_type": "linear"}),
        (
            {"method": "ties", "ties_merge": "mean", "ties_density": 0.25, "weights": 0.7},
            {"combination_type": "ties", "density": 0.25},
        ),
    ],
)
def test_task_vectors_of_factors_as_peft_adds_them(ours, theirs):
    model = zero_safe(family())
    report = fuse("safe", TASKS, model=model, adapter_name="fused", **ours)
    assert report.plan.layout == "continued"
    scaling = 2.0  # PEFT multiplies each factor by sqrt(weight * scaling)
    model.add_weighted_adapter([f"{name}_vector" for name in TASKS], [0.7**2 / scaling] * 2, "theirs", **theirs)
    parameters = dict(model.named_parameters())
    compared = 0
    for key, parameter in parameters.items():
        if ".theirs." in key and "lora_" in key:
            safe, factor = (parameters[key.replace(".theirs.", f".{name}.")] for name in ("safe", "fused"))
            found = factor - (scaling if "lora_B" in key else 1.0) * safe
            torch.testing.assert_close(found, (scaling if "lora_B" in key else 1.0) * parameter, rtol=1e-4, atol=1e-6)
            compared += 1
    assert compared == 12


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"method": "task_arithmetic", "weights": 0.7}, {"combination_type": "cat"}),
        ({"method": "task_arithmetic", "weights": 0.7, "rank": 4}, {"combination_type": "svd", "svd_rank": 4}),
        ({"method": "average"}, {"combination_type": "cat"}),
        (
            {"method": "ties", "ties_merge": "mean", "ties_density": 0.25, "weights": 0.7, "rank": 6},
            {"combination_type": "ties_svd", "density": 0.25, "svd_rank": 6},
        ),
    ],
)
def test_independent_adapters_as_peft_adds_them(ours, theirs):
    model = family(continued=False)
    fuse(None, TASKS, model=model, adapter_name="fused", layout="independent", **ours)
    weight = 0.5 if ours["method"] == "average" else 0.7
    model.add_weighted_adapter(TASKS, [weight] * 2, "theirs", **theirs)
    ours_dense, theirs_dense = deltas(model, "fused"), deltas(model, "theirs")
    assert ours_dense.keys() == theirs_dense.keys()
    for name, found in ours_dense.items():
        torch.testing.assert_close(found, theirs_dense[name], rtol=1e-3, atol=1e-5)


def test_dare_keeps_what_it_is_expected_to_keep():
    """PEFT draws from the global generator, so only the statistics can agree: unbiased, with the stated share
    dropped.
    """
    model = family()
    fuse("safe", TASKS, model=model, method="dare", weights=1.0, drop=0.4, adapter_name="dare")
    parameters = dict(model.named_parameters())
    dropped, total = 0, 0
    for key, parameter in parameters.items():
        if ".dare." in key and "lora_A" in key:
            safe, one, two = (parameters[key.replace(".dare.", f".{name}.")] for name in ("safe", *TASKS))
            unit = (parameter - safe) * 0.6
            for choice in ((0, 0), (0, 1), (1, 0), (1, 1)):
                candidate = choice[0] * (one - safe) + choice[1] * (two - safe)
                close = torch.isclose(unit, candidate, rtol=1e-3, atol=1e-6)
                dropped += int(close.sum()) * (2 - sum(choice))
                total += 2 * int(close.sum())
    assert total >= 2 * 0.99 * sum(p.numel() for k, p in parameters.items() if ".dare." in k and "lora_A" in k)
    assert dropped / total == pytest.approx(0.4, abs=0.03)
