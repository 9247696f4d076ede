"""`verify` on a subspace that the adapter was not made with: how much of the update lies in it."""

import statistics

import pytest
import torch
from typer.testing import CliRunner

from peft_safety import SafetySubspace, repair_adapter, safe_lora_dir, verify
from peft_safety.cli import app
from peft_safety.convert.acting import acting, shares
from peft_safety.errors import ArtifactError, ProtectionError
from tests.peft import cells
from tests.peft.frozen_cells import frozen, windowed
from tests.peft.guard_cells import TASK, guarded, subspace
from tests.peft.repair_cells import aligned_llama

MODELS = {
    "ordinary": lambda: cells.plain(target_modules=cells.LINEAR_TARGETS),
    "frozen": frozen,
    "window": windowed,
    "projected": guarded,
    "outputs": cells.protected,
}


@pytest.fixture(scope="module")
def own():
    """A subspace of the user's own, of the same base."""
    return subspace(cells.base_model(), TASK)


def saved(kind, folder):
    model = MODELS[kind]()
    cells.train(model, cells.adamw, 3)
    model.eval().save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", MODELS)
def test_the_error_says_how_much_of_the_update_lies_in_it(kind, own, tmp_path):
    model = saved(kind, tmp_path / "adapter")
    updates = cells.deltas(model)
    inside = {name: float((dw @ own.bases[name]["in"]).norm() / dw.norm()) for name, dw in updates.items()}
    worst = max(inside, key=inside.get)
    error, words = (
        (ArtifactError, "promises no") if kind == "ordinary" else (ProtectionError, "was made with subspace")
    )
    with pytest.raises(error, match=words) as told:
        verify(tmp_path / "adapter", subspace=own)
    text = str(told.value)
    assert f"in that subspace lies {inside[worst]:.1%} of its update of {worst} (lora_A (4, " in text
    assert f"{statistics.median(inside.values()):.1%} in the median of {len(inside)} modules" in text
    assert "peft-safety repair" in text


def test_the_shares_are_what_a_repair_takes_out(own, tmp_path):
    saved("ordinary", tmp_path / "adapter")
    removed = {row.name: row.removed for row in repair_adapter(tmp_path / "adapter", own).modules}
    own.save(tmp_path / "own.safetensors")
    told = CliRunner().invoke(
        app, ["verify", str(tmp_path / "adapter"), "--subspace", str(tmp_path / "own.safetensors")]
    )
    assert told.exit_code == 1
    assert f"{max(removed.values()):.1%} of its update of {max(removed, key=removed.get)}" in told.stderr


def test_nothing_of_a_projected_update_may_lie_in_it(own, tmp_path):
    model = saved("projected", tmp_path / "adapter")
    space = model.peft_config["default"].subspace
    assert verify(tmp_path / "adapter", subspace=space).blindness_checked
    part = SafetySubspace({name: {"in": sides["in"][:, :3]} for name, sides in space.bases.items()})
    assert part.digest != space.digest
    assert verify(tmp_path / "adapter", subspace=part).blindness_checked, "a part of what it avoids"
    fewer = SafetySubspace({name: sides for name, sides in part.bases.items() if "down_proj" not in name})
    with pytest.raises(ProtectionError, match="2 modules have no basis there that fits"):
        verify(tmp_path / "adapter", subspace=fewer)


def test_safe_lora_keeps_an_update_out_of_no_subspace(own, tmp_path):
    saved("ordinary", tmp_path / "adapter")
    cells.base_model().save_pretrained(tmp_path / "unaligned")
    aligned_llama().save_pretrained(tmp_path / "aligned")
    pair = tmp_path / "unaligned", tmp_path / "aligned"
    safe_lora_dir(tmp_path / "adapter", *pair, out_dir=tmp_path / "out", select="all", progress=False)
    assert verify(tmp_path / "out").repaired == 6
    with pytest.raises(ProtectionError, match="out of no subspace: in that subspace lies"):
        verify(tmp_path / "out", subspace=own)


def test_a_basis_of_another_size_is_none(own):
    factors = {name: (torch.ones(2, 7), torch.ones(5, 2)) for name in own.bases}
    assert shares(own, factors) == {}
    assert acting(own, factors) == f"that subspace has no basis that fits any of its {len(factors)} modules"
