"""Masks on disk: the same function back, the same bytes again, and nothing hostile let in."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from peft_safety.core.plain_lora import Factors
from peft_safety.errors import ArtifactError
from peft_safety.methods.somf.masks import FILE_NAME, HEADER, Masks, export, load_masks, save_masks
from peft_safety.methods.somf.updates import Continued


def logits(seed=0):
    g = torch.Generator().manual_seed(seed)
    return {"m.lora_A": torch.randn(3, 7, generator=g), "m.lora_B": torch.randn(5, 3, generator=g)}


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3), st.integers(0, 999))
@settings(deadline=None)
def test_a_round_trip_changes_nothing(tmp_path_factory, shapes, seed):
    g = torch.Generator().manual_seed(seed)
    values = {f"m{i}": torch.randint(0, 2, shape, generator=g, dtype=torch.uint8) for i, shape in enumerate(shapes)}
    folder = tmp_path_factory.mktemp("masks")
    path = save_masks(Masks(values, {"export": "test"}), folder)
    found = load_masks(path)
    assert found.record == {"export": "test"}
    assert all(torch.equal(found.values[name], value) for name, value in values.items())
    assert path.read_bytes() == save_masks(found, folder / "again.safetensors").read_bytes()


def test_masks_reload_to_the_same_function(tmp_path):
    g = torch.Generator().manual_seed(1)
    safe, task = (Factors(torch.randn(3, 7, generator=g), torch.randn(5, 3, generator=g), 2.0) for _ in range(2))
    update = Continued("m", safe, [(1.0, task)], "element", "mean")
    masks = export(logits(), "threshold")
    found = load_masks(save_masks(masks, tmp_path))
    for a, b in zip(update.factors(masks.of), update.factors(found.of), strict=True):
        assert torch.equal(a, b)
    stored = sum(tensor.numel() * tensor.element_size() for tensor in load_file(tmp_path / FILE_NAME).values())
    assert stored == 36, "one byte per entry"


def test_two_exports_of_one_mask_are_the_same_file(tmp_path):
    for how in ("threshold", "topk", "sample"):
        density = 0.4 if how == "topk" else None
        one, two = (
            save_masks(export(logits(), how, density=density, seed=5), tmp_path / f"{how}{i}.safetensors")
            for i in range(2)
        )
        assert one.read_bytes() == two.read_bytes()


def test_logits_are_kept_for_later_exports(tmp_path):
    path = save_masks(logits(), tmp_path / "logits.safetensors", {"step": 3})
    found = load_masks(path)
    assert all(torch.equal(found[name], value) for name, value in logits().items())
    assert torch.equal(export(found, "threshold").values["m.lora_A"], export(logits(), "threshold").values["m.lora_A"])


def rewritten(path, change):
    """The file with a changed header, or changed tensors."""
    from safetensors import safe_open

    with safe_open(path, "pt") as handle:
        header = json.loads(handle.metadata()[HEADER])
    tensors = load_file(path)
    change(header, tensors)
    save_file(tensors, path, metadata={"format": "pt", HEADER: json.dumps(header)})


CASES = {
    "another version": lambda h, t: h.update(version=1),
    "no record": lambda h, t: h.pop("record"),
    "no masks": lambda h, t: t.clear(),
    "a value that is neither 0 nor 1": lambda h, t: t["m.lora_A"].fill_(2),
    "another dtype": lambda h, t: t.update({"m.lora_A": torch.zeros(3, 7, dtype=torch.int64)}),
    "masks and logits": lambda h, t: t.update({"m.lora_A": torch.zeros(3, 7)}),
}


@pytest.mark.parametrize("case", CASES)
def test_files_that_are_not_whole(tmp_path, case):
    path = save_masks(export(logits(), "threshold"), tmp_path)
    rewritten(path, CASES[case])
    with pytest.raises(ArtifactError):
        load_masks(path)


def test_files_of_other_kinds(tmp_path):
    with pytest.raises(ArtifactError, match="missing"):
        load_masks(tmp_path)
    save_file({"a": torch.ones(2)}, tmp_path / "plain.safetensors")
    with pytest.raises(ArtifactError, match="no masks"):
        load_masks(tmp_path / "plain.safetensors")
    (tmp_path / "mask.pt").write_bytes(b"x")
    with pytest.raises(ArtifactError, match="pickle"):
        load_masks(tmp_path / "mask.pt")


def test_logits_that_are_not_finite(tmp_path):
    path = save_masks({"a": torch.tensor([1.0, float("nan")])}, tmp_path / "l.safetensors", {})
    with pytest.raises(ArtifactError, match="finite"):
        load_masks(path)
