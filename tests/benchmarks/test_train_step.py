"""The benchmark of a training step: what each arm trains, and that all have the same base."""

from __future__ import annotations

import pytest
import torch

from benchmarks import train_step
from benchmarks.common import Spent, in_turns
from tests.peft import cells


@pytest.mark.parametrize("arm", train_step.ARMS)
def test_a_step_changes_what_the_arm_trains_and_no_base_weight(arm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_step, "SAFETY_RANK", 4)
    base = cells.base_model()
    model = train_step.twin(base)
    kept = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    step = train_step.step_of(model, arm)
    factors = {name: p.detach().clone() for name, p in model.named_parameters() if ".lora_" in name}
    for _ in range(2):  # A has no gradient while B is zero
        step(6)
    changed = {
        name.split(".lora_")[1][0]
        for name, p in model.named_parameters()
        if name in factors and not torch.equal(p, factors[name])
    }
    assert changed == ({"B"} if arm in ("frozen", "lora-fa") else {"A", "B"})
    assert all(torch.equal(parameter, kept[name]) for name, parameter in base.named_parameters())
    places = {parameter.data_ptr() for parameter in model.parameters()}
    assert all(parameter.data_ptr() in places for parameter in base.parameters())


def test_turns_go_forwards_and_backwards() -> None:
    order: list[str] = []
    works = {name: (lambda name=name: order.append(name)) for name in "ab"}
    assert in_turns(works, 3, 1, lambda work: work() or 1.0) == {"a": [1.0] * 3, "b": [1.0] * 3}
    assert "".join(order) == "abbaabba"


def test_ratios_are_of_each_round() -> None:
    times = {"frozen": [Spent(3.0, 1.0)] * 4, "lora": [Spent(2.0, 4.0), Spent(6.0, 2.0)] * 2}
    row = train_step.compared(times, "frozen", "lora")
    assert (row["wall"], row["cpu"]) == (1.0, 0.375)
    assert row["seconds"]["lora wall s"] == 4.0
