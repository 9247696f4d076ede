"""The benchmark of operations: its arms compute the same layer, and its GPU parts run (on the CPU, at sizes whose
times mean nothing).
"""

from __future__ import annotations

import torch

from benchmarks import ops_together
from benchmarks.ops import TARGETS
from benchmarks.ops_arms import arms, errors, layer
from benchmarks.ops_gpu import everything


def test_all_protected_arms_give_the_same_numbers() -> None:
    one = layer(64, 128, "cpu", torch.float32)
    x = torch.randn(80, 128)
    found = {name: arm(x).detach() for name, arm in arms(one).items()}
    unprotected = found.pop("peft LoRA"), found.pop("LoRA, this path")
    torch.testing.assert_close(found.pop("this, frozen A"), unprotected[0], rtol=1e-4, atol=1e-4)
    for pair in (unprotected, *((found["naive SaLoRA"], other) for other in found.values())):
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-4)
    assert float((unprotected[0] - found["this"]).abs().max()) > 1e-3


def test_errors_are_those_of_the_dtype() -> None:
    one = layer(64, 128, "cpu", torch.float32)
    x = torch.randn(80, 128)
    found = errors(one, x)
    assert found.keys() == arms(one).keys()
    assert max(found.values()) <= 1e-6


def test_layers_with_one_input_give_the_same_either_way() -> None:
    """One after another and as one function: outputs and gradients."""
    ways = ops_together.works((48, 16, 16), 64, 70, "cpu", torch.float32)
    found, wanted = (ways[name]() for name in ops_together.ARMS)
    assert len(found) == len(wanted) == 3 + 1 + 3
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_every_part_runs_and_names_what_the_targets_name() -> None:
    rows, figures = everything("cpu", 1, tiny=True)
    assert {part: set(found) for part, found in figures.items()} == {
        part: set(found) for part, found in TARGETS.items()
    }
    assert {row["part"][:2] for row in rows} == {"K1", "K2", "K6"}
    assert all(row["us"] > 0 for row in rows)
