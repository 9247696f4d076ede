"""Ranks and alphas of an adapter onto which another one is swapped or loaded, and of what is saved afterwards."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

from peft_safety import assert_protected
from peft_safety.errors import ArtifactError
from tests.peft import cells
from tests.peft.guard_cells import config, subspace

FORMS = ("salora", "A", "B")


def made(form, path=None, **options):
    """A model with random factors, saved."""
    torch.manual_seed(0)
    if form == "salora":
        own = cells.config(**options)
    else:
        own = config(
            subspace(cells.base_model()), train=form, **({"a_init": "random"} if form == "B" else {}), **options
        )
    model = get_peft_model(cells.base_model(), own)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    if path is not None:
        model.eval().save_pretrained(path)
    return model.eval()


def loaded(path):
    return PeftModel.from_pretrained(cells.base_model(), path).eval()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("padded", [False, True])
def test_what_was_swapped_is_saved_with_its_own_scaling(form, padded, tmp_path):
    sizes = [(4, 8), (2, 3), (6, 32)]
    expected = [cells.logits(made(form, tmp_path / str(r), r=r, lora_alpha=alpha)) for r, alpha in sizes]
    model = loaded(tmp_path / "4")
    if padded:
        prepare_model_for_compiled_hotswap(model, target_rank=6)
        model.save_pretrained(tmp_path / "saved")
        cells.assert_same_function(cells.logits(loaded(tmp_path / "saved")), expected[0])
    for (r, _), wanted in zip(sizes[1:] + sizes, expected[1:] + expected, strict=True):
        hotswap_adapter(model, str(tmp_path / str(r)), "default")
        model.save_pretrained(tmp_path / "saved")
        assert_protected(model)
        cells.assert_same_function(cells.logits(model), wanted)
        cells.assert_same_function(cells.logits(loaded(tmp_path / "saved")), wanted)


@pytest.mark.parametrize("form", FORMS)
def test_a_swap_keeps_the_alphas_of_patterns(form, tmp_path):
    """PEFT's own reads none."""
    options = {"alpha_pattern": {"v_proj": 32}, "rank_pattern": {"q_proj": 2}, "use_rslora": True}
    expected = cells.logits(made(form, tmp_path, **options))
    model = loaded(tmp_path)
    hotswap_adapter(model, str(tmp_path), "default")
    cells.assert_same_function(cells.logits(model), expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("other", [{"lora_alpha": 16}, {"use_rslora": True}, {"alpha_pattern": {"v_proj": 32}}])
def test_factors_of_another_scaling_are_not_loaded_onto_an_adapter(form, other, tmp_path):
    made(form, tmp_path / "same")
    made(form, tmp_path / "other", **other)
    model = loaded(tmp_path / "same")
    before = cells.logits(model)
    with pytest.raises(ArtifactError, match=r"have other alphas: they scale the update of .*Load it under a new name"):
        model.load_adapter(str(tmp_path / "other"), "default")
    assert torch.equal(cells.logits(model), before)
    model.load_adapter(str(tmp_path / "same"), "default")
    model.load_adapter(str(tmp_path / "other"), "new")


def test_an_alpha_that_a_regular_expression_says_is_saved_by_full_names(tmp_path):
    options = {"alpha_pattern": {r"model\.layers\.[01]\.self_attn\.(q|v)_proj": 16}}
    model = made("B", tmp_path / "first", **options)
    again = loaded(tmp_path / "first")
    cells.assert_same_function(cells.logits(again), cells.logits(model))
    again.save_pretrained(tmp_path / "second")
    cells.assert_same_function(cells.logits(loaded(tmp_path / "second")), cells.logits(model))
