"""One config, several adapters: a copy of an adapter is a copy, another model gets what the user asked for, and the
user's own config stays what it was.
"""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from peft_safety import GuardSpaceConfig, OrthoSafetyPatchConfig, SafetySubspace, SaLoRAConfig, assert_protected
from peft_safety.calibration import activations
from peft_safety.core.projection import leak
from peft_safety.core.subspace import NARROW
from peft_safety.data import calibration_rows
from peft_safety.errors import ConfigError, SubspaceError
from peft_safety.layers import protected_leaves
from peft_safety.methods import base as base_module
from peft_safety.methods.guardspace import config as guardspace
from tests.peft import cells
from tests.peft.frozen_cells import windowed
from tests.peft.guard_cells import guarded
from tests.tiny import tiny_llama, tiny_tokenizer

TARGETS = ["q_proj", "down_proj"]


def rows(seed: int) -> list[dict[str, Tensor]]:
    ids = cells.tokens(4, 24, seed)
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}]


def subspace(method: str, seed: int = 3) -> SafetySubspace:
    return SafetySubspace.from_activations(
        cells.base_model(), rows(seed), method=method, rank=4, target_modules=TARGETS, allow_fewer=True, progress=False
    )


def residual_config(kind: str, **options: Any) -> Any:
    common = {"r": 4, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **options}
    if kind == "task":
        return SaLoRAConfig(**common, subspace=subspace("salora"), init="task", task_data=rows(4), task_rank=8)
    return GuardSpaceConfig(**common, subspace=subspace("guardspace"), init="guardspace", init_data=rows(4))


@pytest.fixture
def calibrations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is computed on data from here on: every pass over the model goes through `collect`."""
    seen: list[str] = []
    for module in (activations, guardspace):
        original = module.collect

        def counted(*args: Any, original: Any = original, **kwargs: Any) -> Any:
            seen.append(kwargs.get("what", "calibrating"))
            return original(*args, **kwargs)

        monkeypatch.setattr(module, "collect", counted)
    return seen


def frozen(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    return {
        name.removesuffix(f".{adapter}"): leaf.initial
        for name, leaf in protected_leaves(model)
        if name.endswith(f".{adapter}") and leaf.initial is not None
    }


def copy_weights(model: nn.Module, source: str, target: str) -> None:
    """What TRL does for its reference adapter: parameters by name."""
    for name, parameter in list(model.named_parameters()):
        if f".{source}." in name:
            model.get_parameter(name.replace(f".{source}.", f".{target}.")).data.copy_(parameter.data)


def outputs(model: Any, adapter: str) -> Tensor:
    model.set_adapter(adapter)
    return cells.logits(model.eval())


COPIES: dict[str, Callable[[Any], Any]] = {
    "same": lambda c: c,
    "copied": copy.copy,
    "deeply_copied": copy.deepcopy,
    "pickled": lambda c: pickle.loads(pickle.dumps(c)),
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("loaded", [False, True], ids=["made", "loaded"])
@pytest.mark.parametrize("kind", ["task", "guardspace"])
def test_an_adapter_from_the_config_of_another_is_its_copy(
    kind: str, loaded: bool, way: str, tmp_path: Path, calibrations: list[str]
) -> None:
    model = get_peft_model(cells.base_model(), residual_config(kind))
    cells.train(model, cells.adamw, 2)
    if loaded:
        model.save_pretrained(tmp_path)
        model = PeftModel.from_pretrained(cells.base_model(), tmp_path, is_trainable=True)
    calibrations.clear()
    model.add_adapter("ref", COPIES[way](model.peft_config["default"]))
    assert not calibrations
    torch.testing.assert_close(
        outputs(model, "ref"), cells.logits(cells.base_model()), rtol=1e-5, atol=1e-5
    )  # fresh, as LoRA's would be
    first, second = frozen(model, "default"), frozen(model, "ref")
    assert first
    assert first.keys() == second.keys()
    for name, factor in first.items():
        torch.testing.assert_close(second[name], factor, rtol=0, atol=0)
        assert second[name] is not factor
    copy_weights(model, "default", "ref")
    torch.testing.assert_close(outputs(model, "ref"), outputs(model, "default"), rtol=1e-6, atol=1e-6)
    before = outputs(model, "ref")
    model.set_adapter("default")
    cells.train(model, cells.adamw, 2)
    torch.testing.assert_close(outputs(model, "ref"), before, rtol=0, atol=0)  # the two share nothing that trains
    assert_protected(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_copy_is_not_rounded_to_the_base_models_precision(dtype: torch.dtype) -> None:
    model = get_peft_model(cells.base_model().to(dtype), cells.config("linear", "task", seed=1, lora_alpha=16))
    for leaf in dict(protected_leaves(model)).values():
        leaf.initial = leaf.initial.float() * 1.2345678  # frozen factors that no half-precision number is equal to
    model.add_adapter("ref", model.peft_config["default"])
    first, second = frozen(model, "default"), frozen(model, "ref")
    assert all(torch.equal(second[name], factor) for name, factor in first.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_residual_loaded_onto_a_half_precision_base_is_not_rounded(dtype: torch.dtype, tmp_path: Path) -> None:
    cells.protected("linear", "task", trained=True).save_pretrained(tmp_path)
    saved = frozen(PeftModel.from_pretrained(cells.base_model(), tmp_path), "default")
    half = frozen(PeftModel.from_pretrained(cells.base_model().to(dtype), tmp_path), "default")
    assert all(torch.equal(half[name], factor) for name, factor in saved.items())


def test_a_copy_of_a_resumed_adapter_has_the_factors_it_resumed_from(tmp_path: Path) -> None:
    cells.protected("linear", "task", seed=2, trained=True).save_pretrained(tmp_path)
    model = cells.protected("linear", "task", seed=1, trained=True)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    model.add_adapter("ref", model.peft_config["default"])
    copy_weights(model, "default", "ref")
    torch.testing.assert_close(outputs(model, "ref"), outputs(model, "default"), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["task", "guardspace"])
def test_the_users_config_makes_a_second_adapter_without_a_second_calibration(
    kind: str, calibrations: list[str]
) -> None:
    config = residual_config(kind)
    model = get_peft_model(cells.base_model(), config)
    calibrations.clear()
    model.add_adapter("second", config)
    assert not calibrations
    assert all(torch.equal(frozen(model, "second")[name], factor) for name, factor in frozen(model, "default").items())


@pytest.mark.parametrize("mixed", [False, True])
def test_a_copy_leaves_out_what_the_adapter_leaves_out(mixed: bool, calibrations: list[str]) -> None:
    whole = subspace("salora")
    kept = [name for name in whole.module_names if name.endswith("q_proj")]
    space = whole.restricted(kept)
    space.provenance["left_out"] = {NARROW: [name for name in whole.module_names if name not in kept]}
    config = SaLoRAConfig(r=4, target_modules=TARGETS, subspace=space, init="task", task_data=rows(4), task_rank=8)
    model = get_peft_model(cells.base_model(), config, mixed=mixed)
    calibrations.clear()
    model.add_adapter("ref", model.peft_config["default"])
    assert not calibrations
    assert {name for name, _ in cells.layers_of(model, "ref")} == set(kept)
    assert all(torch.equal(frozen(model, "ref")[name], factor) for name, factor in frozen(model, "default").items())
    assert_protected(model)


def test_a_copy_of_a_patch_keeps_the_subspace_that_its_priors_gave(tmp_path: Path) -> None:
    cells.perturb(cells.plain(target_modules=TARGETS)).save_pretrained(tmp_path / "prior")
    config = OrthoSafetyPatchConfig(
        r=2, safety_rank=2, basis="weight", target_modules=TARGETS, prior_patches=[str(tmp_path / "prior")]
    )
    get_peft_model(cells.base_model(), config).save_pretrained(tmp_path / "patch")
    model = PeftModel.from_pretrained(cells.base_model(), tmp_path / "patch", is_trainable=True)
    model.add_adapter("ref", model.peft_config["default"])  # the name "prior" says nothing here
    assert model.peft_config["ref"].subspace.digest == model.peft_config["default"].subspace.digest


@pytest.mark.parametrize("change", [{"r": 2}, {"init_data": rows(9)}])
def test_a_config_that_asks_for_another_adapter_gets_another_one(
    change: dict[str, Any], calibrations: list[str]
) -> None:
    model = get_peft_model(cells.base_model(), residual_config("guardspace"))
    calibrations.clear()
    config = copy.deepcopy(model.peft_config["default"])
    for name, value in change.items():
        setattr(config, name, value)
    model.add_adapter("other", config)
    assert calibrations
    assert_protected(model, "other")
    assert any(
        not torch.equal(frozen(model, "other")[name], factor) for name, factor in frozen(model, "default").items()
    )


# --- one config, two models


def on_disk(path: Path, hidden: int, seed: int = 0) -> nn.Module:
    model = tiny_llama(seed, hidden=hidden)
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return type(model).from_pretrained(path)


AUTO: dict[str, Callable[[], Any]] = {
    "salora": lambda: SaLoRAConfig(r=4, target_modules=["q_proj"], safety_rank=4),
    "guardspace": lambda: GuardSpaceConfig(r=4, target_modules=["q_proj"]),
    "guardspace_residual": lambda: GuardSpaceConfig(r=4, target_modules=["q_proj"], init="guardspace"),
    "ortho_patch": lambda: OrthoSafetyPatchConfig(r=4, safety_rank=4, target_modules=["q_proj"]),
    "weights": lambda: OrthoSafetyPatchConfig(r=4, safety_rank=4, basis="weight", target_modules=["q_proj"]),
}


@pytest.mark.parametrize("bound", [False, True], ids=["users", "models"])
@pytest.mark.parametrize("kind", AUTO)
def test_auto_means_each_model(kind: str, bound: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another width, other weights: each as a new config would have it."""
    for module in (base_module, guardspace):
        monkeypatch.setattr(module, "calibration_rows", lambda *args: calibration_rows(*args)[:4])  # enough, and fast
    config = AUTO[kind]()
    first = get_peft_model(on_disk(tmp_path / "a", 32), config)
    digest = first.peft_config["default"].subspace.digest
    assert (config.subspace, config._modules) == ("auto", {})
    given = first.peft_config["default"] if bound else config
    for folder, hidden, seed in (("wide", 64, 0), ("other", 32, 1)):
        model = get_peft_model(on_disk(tmp_path / folder, hidden, seed), given)
        assert_protected(model)
        alone = get_peft_model(on_disk(tmp_path / folder, hidden, seed), AUTO[kind]())
        assert model.peft_config["default"].subspace.digest == alone.peft_config["default"].subspace.digest != digest
        assert all(
            torch.equal(frozen(alone, "default")[name], factor) for name, factor in frozen(model, "default").items()
        )
    assert first.peft_config["default"].subspace.digest == digest
    assert_protected(first)
    first.save_pretrained(tmp_path / "saved")
    assert PeftConfig.from_pretrained(tmp_path / "saved").subspace.digest == digest


SIZES: dict[str, tuple[Callable[[], Any], tuple[Any, Any, Any]]] = {
    "salora": (
        lambda: SaLoRAConfig(r=2, target_modules=TARGETS, safety_rank=0.25, safety_rank_pattern={"down_proj": 3}),
        (0.25, None, {"down_proj": 3}),
    ),
    "guardspace": (lambda: GuardSpaceConfig(r=2, target_modules=["q_proj"]), (None, None, None)),
    "weights": (
        lambda: OrthoSafetyPatchConfig(
            r=2,
            basis="weight",
            target_modules=TARGETS,
            safety_energy=0.5,
            safety_rank_pattern={"down_proj": 0.1},
        ),
        (None, 0.5, {"down_proj": 0.1}),
    ),
}


@pytest.mark.parametrize("kind", SIZES)
def test_the_size_that_was_asked_for_is_kept(kind: str, tmp_path: Path) -> None:
    """In the user's config, in the adapter's, and in the saved one; a new size means a new calibration."""
    make, asked = SIZES[kind]
    config = make()
    model = get_peft_model(on_disk(tmp_path / "base", 32), config)
    model.save_pretrained(tmp_path / "saved")
    own = model.peft_config["default"]
    for each in (config, own, PeftConfig.from_pretrained(tmp_path / "saved")):
        assert (each.safety_rank, each.safety_energy, each.safety_rank_pattern) == asked
    ranks = {name: own.subspace.rank(name, own.basis_sides[0]) for name in own.subspace.module_names}
    if kind == "salora":
        assert all(rank == (3 if name.endswith("down_proj") else 8) for name, rank in ranks.items())
    if kind == "weights":
        assert max(rank for name, rank in ranks.items() if name.endswith("down_proj")) < min(
            rank for name, rank in ranks.items() if name.endswith("q_proj")
        )
    changed = copy.copy(own)
    changed.safety_rank, changed.safety_energy, changed.safety_rank_pattern = 5, None, None
    model.add_adapter("other", changed)
    other = model.peft_config["other"].subspace
    assert {other.rank(name, own.basis_sides[0]) for name in other.module_names} == {5}


def test_data_of_a_config_count_for_each_model() -> None:
    config = SaLoRAConfig(
        r=4, target_modules=TARGETS, subspace=subspace("salora"), init="task", task_data=rows(1), task_rank=8
    )
    for _ in range(2):
        assert_protected(get_peft_model(cells.base_model(), config))
    assert config.task_data is not None


def test_a_given_subspace_of_another_model_is_still_refused() -> None:
    config = SaLoRAConfig(r=4, target_modules=TARGETS, subspace=subspace("salora"))
    first = get_peft_model(cells.base_model(), config)
    for given in (config, first.peft_config["default"]):
        with pytest.raises(SubspaceError):
            get_peft_model(cells.base_model(seed=1), given)


def test_the_users_config_stays_what_it_was(tmp_path: Path) -> None:
    config = residual_config("guardspace", target_modules="all-linear", r=2)
    config.subspace = SafetySubspace.from_activations(
        cells.base_model(),
        rows(3),
        method="guardspace",
        rank=4,
        target_modules="all-linear",
        allow_fewer=True,
        progress=False,
    )
    before = {
        field.name: copy.copy(getattr(config, field.name))
        for field in dataclasses.fields(config)
        if field.name not in ("subspace", "init_data")
    }
    model = get_peft_model(cells.base_model(), config)
    cells.train(model, cells.adamw, 1)
    model.save_pretrained(tmp_path)
    after = {name: getattr(config, name) for name in before}
    after.pop("base_model_name_or_path"), before.pop("base_model_name_or_path")  # PEFT's own note
    assert after == before
    assert len(model.peft_config["default"].target_modules) > 1


def test_a_directorys_config_does_for_several_models(tmp_path: Path) -> None:
    saved = cells.protected("linear", "task", trained=True)
    saved.save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    for _ in range(2):
        model = PeftModel.from_pretrained(cells.base_model(), tmp_path, config=config)
        torch.testing.assert_close(cells.logits(model.eval()), cells.logits(saved), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["in", "window"])
def test_a_new_adapter_by_a_directorys_config_keeps_its_raw_factors_to_itself(kind: str, tmp_path: Path) -> None:
    """PEFT's random `lora_A` stays raw in it, as if an optimizer had moved it: stored factors could have come next."""
    (guarded() if kind == "in" else windowed()).save_pretrained(tmp_path / "saved")

    def made() -> Any:
        torch.manual_seed(0)
        config = PeftConfig.from_pretrained(tmp_path / "saved")
        config.inference_mode = False
        model = get_peft_model(cells.base_model(), config)
        assert min(leak(leaf.basis, leaf.raw(), leaf.side) for _, leaf in protected_leaves(model)) > 0.1, "raw"
        return model

    leaves = dict(protected_leaves(made()))

    def worst(weights: dict[str, Tensor]) -> float:
        return max(leak(leaf.basis, weights[f"{name}.weight"], leaf.side) for name, leaf in leaves.items())

    assert torch.equal(cells.logits(made()), cells.logits(cells.base_model()))
    for copied in (made(), copy.deepcopy(made()), pickle.loads(pickle.dumps(made()))):
        assert worst(copied.state_dict()) < 1e-6
    made().save_pretrained(tmp_path / "made")
    stored = load_file(tmp_path / "made" / "adapter_model.safetensors")
    assert worst({name.replace(".weight", ".default.weight"): w for name, w in stored.items()}) < 1e-6
    trained, folded = made(), made().eval()
    for model in (trained, folded):
        cells.train(model, cells.adamw, 3)
    cells.assert_same_function(cells.logits(trained), cells.logits(folded))
    assert_protected(trained)


@pytest.mark.parametrize(
    "how", [lambda c: c, copy.deepcopy, dataclasses.replace], ids=["same", "deeply_copied", "replaced"]
)
@pytest.mark.parametrize("kind", ["task", "guardspace"])
def test_frozen_factors_that_nothing_has_are_not_invented(
    kind: str, how: Callable[[Any], Any], tmp_path: Path
) -> None:
    get_peft_model(cells.base_model(), residual_config(kind)).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(cells.base_model(), tmp_path, is_trainable=True)
    with pytest.raises(ConfigError, match="directory"):
        get_peft_model(cells.base_model(), how(loaded.peft_config["default"]))
    config = how(loaded.peft_config["default"])
    config.r = 2
    with pytest.raises(ConfigError, match="directory"):
        loaded.add_adapter("narrow", config)
    assert_protected(loaded, "default")
