"""OrthoSafetyPatch: what it refuses, and that nothing is half-applied."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from peft_safety import OrthoSafetyPatchConfig, SafetySubspace
from peft_safety.core.plain_lora import MANIFEST
from peft_safety.errors import ArtifactError, ConfigError, SubspaceError
from tests.peft import cells
from tests.peft.patch_cells import config, patched, subspace
from tests.tiny import tiny_llama


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(mode="firm"), "mode='firm'"),
        (dict(basis="magic"), "basis='magic'"),
        (dict(side="left"), "side='left'"),
        (dict(mode="soft", basis="weight"), "needs basis='activation'"),
        (dict(mode="soft", side="out"), "side='in'"),
        (dict(safety_rank=0, safety_energy=0.5), "safety_rank=0"),
        (dict(safety_rank=0), "safety_rank=0 without prior_patches"),
        (dict(safety_rank=-1), "safety_rank=-1"),
        (dict(safety_rank=0, safety_rank_pattern={"q_proj": 2}, prior_patches=["a"]), "has no effect"),
        (dict(reg_lambda=0), "reg_lambda=0"),
        (dict(reg_lambda=float("nan")), "reg_lambda=nan"),
        (dict(prior_patches=["a", "a"]), "names 'a' twice"),
        (dict(prior_patches=["a"], mode="none"), "mode='none' has none"),
        (dict(use_dora=True), "use_dora"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        OrthoSafetyPatchConfig(**options)


def inject(space, model=None, **options):
    return get_peft_model(model or cells.base_model(), config(space, **options))


def test_soft_without_the_datas_spectrum_is_refused():
    base = cells.base_model()
    for space in (subspace(base, basis="weight"), SafetySubspace(subspace(base).bases)):
        with pytest.raises(ConfigError, match="needs a data basis"):
            inject(space, mode="soft")


@pytest.mark.parametrize(("k", "error"), [(32, ConfigError), (16, ConfigError)])
def test_a_basis_that_leaves_nothing_is_refused(k, error):
    with pytest.raises(error, match=rf"rank={k} of {k} (in|out)put features leaves nothing"):
        subspace(cells.base_model(), ("in",) if k == 32 else ("out",), k=k)


def test_prior_patches_that_cannot_be_meant_are_refused(tmp_path):
    base = cells.base_model()
    space = subspace(base)
    with pytest.raises(ConfigError, match="'nowhere' is neither an adapter"):
        inject(space, prior_patches=["nowhere"])
    fresh = get_peft_model(cells.base_model(), LoraConfig(r=4, target_modules=cells.LINEAR_TARGETS))
    fresh.save_pretrained(tmp_path / "untrained")
    with pytest.raises(ConfigError, match="changes none of"):
        inject(space, prior_patches=[str(tmp_path / "untrained")])
    torch.manual_seed(0)
    other = cells.perturb(get_peft_model(cells.base_model(seed=5), config(subspace(cells.base_model(seed=5)))))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(SubspaceError, match="other base weights"):
        inject(space, prior_patches=[str(tmp_path / "other")])
    wide = cells.perturb(get_peft_model(tiny_llama(hidden=64), LoraConfig(r=4, target_modules=cells.LINEAR_TARGETS)))
    wide.save_pretrained(tmp_path / "wide")
    with pytest.raises(ConfigError, match=r"its update of .* is \(64, 64\), the layer \(32, 32\)"):
        inject(space, prior_patches=[str(tmp_path / "wide")])


def test_no_capacity_left_is_an_error_and_nothing_is_left_behind():
    model = patched(side="out")
    cells.perturb(model)
    names = ["default"]
    space = model.peft_config["default"].subspace

    def stack(index):
        name = f"patch{index}"
        model.add_adapter(name, config(space, side="out", prior_patches=list(names)))
        cells.perturb(model, index + 1, name)  # not the seed of the first
        names.append(name)

    stack(0)
    stack(1)  # v_proj has 16 outputs: 6 + 4 + 4 leave this one 2
    with pytest.raises(SubspaceError, match="no capacity is left on side 'out'"):
        stack(2)
    assert set(model.peft_config) == set(names), "the one that failed is not there"
    assert len(names) == 3


@pytest.mark.parametrize(
    "change",
    [
        dict(mode="none"),
        dict(mode="soft"),
        dict(side="out"),
        dict(side="odd"),
        dict(mode="odd"),
        dict(peft_type="LORA"),
        dict(peft_type="SALORA"),
    ],
    ids=str,
)
def test_an_edited_config_cannot_lift_the_constraint(change, tmp_path):
    cells.perturb(patched()).save_pretrained(tmp_path / "a")
    path = tmp_path / "a" / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises((ArtifactError, ConfigError)):
        PeftModel.from_pretrained(cells.base_model(), tmp_path / "a")
    shutil.rmtree(tmp_path / "a")
