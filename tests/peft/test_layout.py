"""A loaded adapter computes what the saved one does to the last bit: its factors lie as new tensors do, wherever their
reader put them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_safety.core import projection
from peft_safety.core.adapter_dir import seal
from peft_safety.layers import protected_leaves
from tests.peft import cells

ALIGNMENT = 64
"""Of torch's own allocator, on CPUs."""


def oddly(values: Tensor, how: str) -> Tensor:
    """The same values in columns, or eight bytes behind where torch would put them."""
    if how == "columns":
        return values.T.contiguous().T
    room = torch.empty(values.numel() + ALIGNMENT)
    start = (-room.data_ptr() % ALIGNMENT) // 4 + 2
    return room[start : start + values.numel()].view(values.shape).copy_(values)


def lies_oddly(values: Tensor) -> bool:
    return not values.is_contiguous() or values.data_ptr() % ALIGNMENT != 0


def odd_ones(model: nn.Module) -> list[str]:
    found = cells.factors(model)
    assert found
    return [name for name, value in found.items() if lies_oddly(value)]


@pytest.mark.parametrize("how", ["columns", "address"])
def test_tensors_that_are_assigned_compute_as_copies_do(how: str) -> None:
    """Without a copy, some of these products have other last bits, on some CPUs."""
    for rank in (2, 4, 8):
        model = inject_adapter_in_model(cells.config("linear", "task", r=rank), cells.base_model())
        cells.perturb(model)
        state = {name: oddly(value, how) for name, value in get_peft_model_state_dict(model).items()}
        assert all(lies_oddly(value) for value in state.values())
        other = inject_adapter_in_model(
            cells.config("linear", "task", r=rank), cells.base_model(), low_cpu_mem_usage=True
        )
        set_peft_model_state_dict(other, state, low_cpu_mem_usage=True)
        cells.assert_same_factors(other, model)
        assert not odd_ones(other)
        for rows in (1, 2, 7):
            assert torch.equal(cells.logits(other, cells.tokens(rows)), cells.logits(model, cells.tokens(rows)))


@pytest.mark.parametrize("init", cells.INITS)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_what_a_file_says_beside_the_factors_does_not_matter(
    low_cpu_mem_usage: bool, init: str, tmp_path: Path
) -> None:
    """The length of its header decides where a file's tensors come to lie."""
    model = cells.protected("linear", init, trained=True, modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path)
    for length in range(0, 24, 8):
        rewritten(tmp_path, length)
        loaded = PeftModel.from_pretrained(cells.base_model(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        cells.assert_same_factors(loaded, model)
        assert not odd_ones(loaded)
        assert not lies_oddly(loaded.base_model.model.lm_head.modules_to_save["default"].weight)
        assert torch.equal(cells.logits(loaded), cells.logits(model))


def rewritten(directory: Path, length: int) -> None:
    """The adapter's file with a longer header, and the hash that goes with it."""
    path = directory / "adapter_model.safetensors"
    with safe_open(path, "pt") as handle:
        metadata = handle.metadata() or {}
    save_file(load_file(path), path, metadata=metadata | {"format": "pt", "note": "n" * length})
    seal(directory)


@pytest.mark.parametrize("combination", ["svd", "magnitude_prune_svd", "cat", "linear"])
def test_a_combination_lies_as_its_copy_on_disk_will(combination: str, tmp_path: Path) -> None:
    model = cells.protected(seed=1)
    model.add_adapter("other", cells.config(seed=1))
    cells.perturb(model)
    model.add_weighted_adapter(["default", "other"], [0.7, -0.3], "mix", combination_type=combination, density=0.5)
    assert not odd_ones(model)
    model.set_adapter("mix")
    expected = cells.logits(model)  # before it is saved
    model.save_pretrained(tmp_path, selected_adapters=["mix"])
    loaded = PeftModel.from_pretrained(cells.base_model(), tmp_path / "mix")
    assert torch.equal(cells.logits(loaded), expected)
    assert not any(leaf.fold() for _, leaf in protected_leaves(loaded)), "moving a factor leaves it folded"


def test_factors_that_a_half_precision_base_rounded_on_loading_are_folded(tmp_path: Path) -> None:
    cells.protected(trained=True).save_pretrained(tmp_path)
    base = cells.base_model().to(torch.bfloat16)
    model = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=True)
    leaves = [leaf for _, leaf in protected_leaves(model) if leaf.basis is not None]
    assert leaves
    for leaf in leaves:
        raw = leaf.raw().detach()
        assert projection.leak(leaf.basis, raw, leaf.side) <= projection.fold_tolerance(raw.dtype)
