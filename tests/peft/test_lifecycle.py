"""Save, load, switch, combine, copy, compile: what people do with a LoRA adapter, done with a protected one."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model

from peft_safety import SafetySubspace, SaLoRAConfig, assert_protected
from peft_safety.errors import ConfigError, PeftSafetyError
from peft_safety.layers import ProtectedLinear, protected_leaves
from tests.peft import cells

LEAK = 1e-6
CELLS = [(base, init) for base in cells.BASES for init in cells.INITS]


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize(("base", "init"), CELLS)
def test_a_loaded_adapter_is_the_saved_one_bit_for_bit(
    base: str, init: str, low_cpu_mem_usage: bool, tmp_path: Path
) -> None:
    model = cells.protected(base, init, trained=True)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(cells.base_model(base), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert_protected(loaded)
    assert not any(p.requires_grad for p in loaded.parameters())
    here, there = dict(protected_leaves(model)), dict(protected_leaves(loaded))
    assert here.keys() == there.keys()
    for name, leaf in here.items():
        assert torch.equal(leaf.weight, there[name].weight)
        assert leaf.initial is None or torch.equal(leaf.initial, there[name].initial)
    assert torch.equal(cells.logits(loaded), cells.logits(model))


@pytest.mark.parametrize("init", cells.INITS)
def test_training_continues_after_a_load_as_if_nothing_had_happened(init: str, tmp_path: Path) -> None:
    model = cells.protected("linear", init)
    cells.train(model, cells.adamw, 5)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(cells.base_model(), tmp_path, is_trainable=True)
    for continued in (model, loaded):
        cells.train(continued, cells.adamw, 5)
    assert torch.equal(cells.logits(loaded), cells.logits(model))
    assert cells.leak(loaded) <= LEAK


def test_loading_into_an_adapter_that_is_there_brings_the_bases_along(tmp_path: Path) -> None:
    model = cells.protected(seed=1, trained=True)
    model.save_pretrained(tmp_path)
    other = cells.protected(seed=2, trained=True)
    other.load_adapter(tmp_path, "default", is_trainable=True)
    assert_protected(other)
    assert cells.leak(other, subspace=model.peft_config["default"].subspace) <= LEAK
    assert torch.equal(cells.logits(other), cells.logits(model))


def test_an_adapter_can_be_saved_and_loaded_under_other_names(tmp_path: Path) -> None:
    model = get_peft_model(cells.base_model(), cells.config(), adapter_name="first")
    cells.perturb(model)
    for _ in range(2):  # the second save replaces the first
        model.save_pretrained(tmp_path)
        cells.perturb(model, 1)
        model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(cells.base_model(), tmp_path / "first", adapter_name="second")
    assert_protected(loaded, "second")
    assert torch.equal(cells.logits(loaded), cells.logits(model))


def test_a_config_of_the_caller_does_for_loading(tmp_path: Path) -> None:
    model = cells.protected(trained=True)
    model.save_pretrained(tmp_path)
    for given in (cells.config(), PeftConfig.from_pretrained(tmp_path)):
        loaded = PeftModel.from_pretrained(cells.base_model(), tmp_path, config=given)
        assert_protected(loaded)
        assert torch.equal(cells.logits(loaded), cells.logits(model))


def test_a_model_card_that_is_there_is_kept(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\nwritten by hand\n")
    cells.protected().save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "written by hand" in card
    assert "license: mit" in card


def test_selected_adapters_alone_are_saved(tmp_path: Path) -> None:
    model = two_adapters()
    model.save_pretrained(tmp_path, selected_adapters=["other"])
    assert (tmp_path / "other" / "safety_subspace.safetensors").is_file()
    assert not (tmp_path / "adapter_config.json").exists()


def two_adapters(init: str = "lora", **options: Any) -> PeftModel:
    """Adapters "default" and "other", of two subspaces, both with random factors."""
    model = cells.protected("linear", init, seed=1)
    model.add_adapter("other", cells.config("linear", init, seed=2, **options))
    return cells.perturb(model)


@pytest.mark.parametrize("init", cells.INITS)
def test_two_adapters_keep_their_own_subspaces(init: str, tmp_path: Path) -> None:
    model = two_adapters(init)
    before = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        before[name] = cells.logits(model)
        assert cells.leak(model, name) <= LEAK
    assert cells.leak(model, "other", model.peft_config["default"].subspace) > 0.01
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(cells.base_model(), tmp_path)
    loaded.load_adapter(tmp_path / "other", "other")
    for name, expected in before.items():
        loaded.set_adapter(name)
        assert torch.equal(cells.logits(loaded), expected)
        assert_protected(loaded, name)


def test_a_disabled_adapter_leaves_the_base_bit_for_bit() -> None:
    before = cells.logits(cells.base_model())
    model = cells.protected(trained=True)
    assert not torch.equal(cells.logits(model), before)
    with model.disable_adapter():
        assert torch.equal(cells.logits(model), before)
    assert torch.equal(cells.logits(model.unload()), before)


def test_a_mixed_batch_gives_each_row_its_own_adapter() -> None:
    model = two_adapters("task")
    model.add_adapter("plain", LoraConfig(r=4, target_modules=cells.targets("linear"), init_lora_weights=False))
    model.eval()
    ids = cells.tokens(4)
    names = ["default", "__base__", "other", "plain"]
    mixed = cells.logits(model, ids, adapter_names=names)
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                expected = cells.logits(model, ids)
        else:
            model.set_adapter(name)
            expected = cells.logits(model, ids)
        torch.testing.assert_close(mixed[row], expected[row], rtol=1e-5, atol=1e-5)


def test_plain_lora_and_a_protected_adapter_share_a_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = get_peft_model(cells.base_model(), LoraConfig(r=4, target_modules=cells.targets("linear")))
    model.add_adapter("safe", cells.config())
    model.set_adapter("safe")
    cells.train(model, cells.adamw, 5)
    model.set_adapter("default")
    cells.train(model, cells.adamw, 5)
    assert cells.leak(model, "safe") <= LEAK
    assert cells.leak(model, "default", model.peft_config["safe"].subspace) > 0.01, "plain LoRA must stay plain"
    assert {type(layer.lora_B["default"]) for _, layer in cells.layers_of(model)} == {torch.nn.Linear}
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert json.loads((tmp_path / "safe" / "adapter_config.json").read_text())["peft_type"] == "SALORA"


def test_deleting_an_adapter_leaves_the_other_one() -> None:
    model = two_adapters()
    model.delete_adapter("default")
    assert list(model.peft_config) == ["other"]
    assert_protected(model)
    assert all("other" in name for name, _ in protected_leaves(model))


COMBINATIONS = {
    "linear": {},
    "cat": {},
    "svd": {},
    "ties": {"density": 0.5},
    "dare_linear": {"density": 0.5},
    "magnitude_prune_svd": {"density": 0.5},
}


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_a_weighted_combination_of_one_subspace_is_protected(combination: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = cells.protected(seed=1)
    model.add_adapter("other", cells.config(seed=1))
    cells.perturb(model)
    model.add_weighted_adapter(
        ["default", "other"], [0.7, -0.3], "mix", combination_type=combination, **COMBINATIONS[combination]
    )
    model.set_adapter("mix")
    assert_protected(model, "mix")
    assert cells.leak(model, "mix") <= LEAK
    # exact ones; svd keeps the rank, so it is the best approximation only, and PEFT 0.20 scales it twice
    if combination == "cat" or (combination == "svd" and Version(peft.__version__) >= Version("0.21")):
        sums = {
            name: 0.7 * delta - 0.3 * cells.deltas(model, "other")[name] for name, delta in cells.deltas(model).items()
        }
        for name, delta in cells.deltas(model, "mix").items():
            distance = float((delta - sums[name]).norm() / sums[name].norm())
            assert distance < (1e-5 if combination == "cat" else 0.9)
    model.save_pretrained(tmp_path, selected_adapters=["mix"])
    loaded = PeftModel.from_pretrained(cells.base_model(), tmp_path / "mix")
    assert torch.equal(cells.logits(loaded), cells.logits(model))


def test_combinations_that_would_not_be_protected_are_refused() -> None:
    model = two_adapters()
    model.add_adapter("plain", LoraConfig(r=4, target_modules=cells.targets("linear")))
    residual = two_adapters("task")
    for refused, names in ((model, ["default", "other"]), (model, ["default", "plain"]), (residual, ["default"])):
        with pytest.raises(ConfigError, match=r"Combine|Use export_lora"):
            refused.add_weighted_adapter(names, [0.5] * len(names), "mix", combination_type="linear")
        assert "mix" not in refused.peft_config
        assert_protected(refused)


PATTERNS: dict[str, dict[str, Any]] = {
    "rank and alpha patterns": {"rank_pattern": {"q_proj": 2, "down_proj": 6}, "alpha_pattern": {"v_proj": 32}},
    "rslora": {"use_rslora": True, "lora_alpha": 5},
    "regular expression": {"target_modules": r".*layers\.[01]\.self_attn\.(q|o)_proj"},
    "layers_to_transform": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "all-linear": {"target_modules": "all-linear"},
    "exclude_modules": {"exclude_modules": ["v_proj"]},
    "anchored rank pattern": {"rank_pattern": {r"^model.layers.0.self_attn.q_proj": 3}},
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_survive_save_and_load(pattern: str, tmp_path: Path) -> None:
    model = cells.protected(trained=True, **PATTERNS[pattern])
    plain = get_peft_model(
        cells.base_model(),
        LoraConfig(r=4, **{"lora_alpha": 8, "target_modules": cells.targets("linear"), **PATTERNS[pattern]}),
    )
    shapes = {name: (layer.r["default"], layer.scaling["default"]) for name, layer in cells.layers_of(plain)}
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(cells.base_model(), tmp_path)
    for found in (model, loaded):
        assert {
            name: (layer.r["default"], layer.scaling["default"]) for name, layer in cells.layers_of(found)
        } == shapes
    assert torch.equal(cells.logits(loaded), cells.logits(model))
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert torch.equal(cells.logits(PeftModel.from_pretrained(cells.base_model(), again)), cells.logits(model))


def test_modules_to_save_warn_and_come_back(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="no projection constrains"):
        model = get_peft_model(cells.base_model(), cells.config(modules_to_save=["lm_head"]))
    cells.train(model, cells.adamw, 3)
    model.eval().save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = PeftModel.from_pretrained(cells.base_model(), tmp_path)
    assert torch.equal(cells.logits(loaded), cells.logits(model))
    assert any(
        "lm_head" in key
        for key in json.loads((tmp_path / "adapter_config.json").read_text())["safety_artifact"]["extra_tensors"]
    )


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize(("base", "init"), [("linear", "lora"), ("linear", "task"), ("nf4", "lora")])
def test_a_copy_of_the_model_is_protected_and_independent(base: str, init: str, how: Any) -> None:
    model = cells.protected(base, init, trained=True)
    before = cells.logits(model)
    twin = how(model)
    assert torch.equal(cells.logits(twin), before)
    cells.train(twin.train(), cells.adamw, 5)
    assert_protected(twin)
    assert cells.leak(twin) <= LEAK
    assert torch.equal(cells.logits(model), before)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    plain, checkpointed = (
        cells.protected("linear", "task", trained=True).train(),
        cells.protected("linear", "task", trained=True).train(),
    )
    checkpointed.enable_input_require_grads()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    ids = cells.tokens()
    for model in (plain, checkpointed):
        model(input_ids=ids, labels=ids).loss.backward()
    expected = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
    found = {name: p.grad for name, p in checkpointed.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


def test_autocast_projects_in_fp32() -> None:
    model = cells.protected("linear", "lora", trained=True)
    leaf = next(leaf for _, leaf in protected_leaves(model))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = leaf.projected()
        assert cells.logits(model).isfinite().all()
        cells.train(model, cells.adamw, 3)
    assert inside.dtype == torch.float32
    assert cells.leak(model) <= LEAK
    fresh, before = cells.protected("linear", "task"), cells.base_model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(cells.logits(fresh), cells.logits(before))


@pytest.mark.parametrize("init", [pytest.param("lora", marks=pytest.mark.slow), "task"])  # task has all that lora has
def test_the_model_compiles_in_one_graph(init: str) -> None:
    torch._dynamo.reset()
    model = cells.protected("linear", init, trained=True)
    ids = cells.tokens()
    expected = cells.logits(model, ids)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(cells.logits(compiled, ids), expected, rtol=1e-5, atol=1e-6)
    # weights are read, not baked in: the next forward sees what a training step did
    cells.train(model, cells.adamw, 2)
    model.eval()
    torch.testing.assert_close(cells.logits(compiled, ids), cells.logits(model, ids), rtol=1e-5, atol=1e-6)
    assert cells.leak(model) <= LEAK
    torch._dynamo.reset()


def test_replacing_a_field_keeps_the_config_usable() -> None:
    first = cells.config()
    second = dataclasses.replace(first, r=2)
    model = get_peft_model(cells.base_model(), second)
    assert second.subspace is first.subspace
    assert {layer.r["default"] for _, layer in cells.layers_of(model)} == {2}
    assert_protected(model)
    again = get_peft_model(cells.base_model(), dataclasses.replace(model.peft_config["default"], lora_alpha=1))
    assert_protected(again)


def test_a_config_survives_its_own_dictionary_before_injection(tmp_path: Path) -> None:
    subspace = cells.random_subspace(cells.base_model(), cells.targets("linear"))
    path = subspace.save(tmp_path / "s.safetensors")
    for source in (path, str(path)):
        config = SaLoRAConfig(r=4, target_modules=cells.targets("linear"), subspace=source)
        assert (
            json.loads(json.dumps({k: v for k, v in config.to_dict().items() if k != "target_modules"}))["peft_type"]
            == "SALORA"
        )
        model = get_peft_model(cells.base_model(), config)
        assert isinstance(model.peft_config["default"].subspace, SafetySubspace)
        assert model.peft_config["default"].subspace.digest == subspace.digest


def test_a_combination_wider_than_a_layer_is_protected_too() -> None:
    model = cells.protected(r=16, seed=1)
    model.add_adapter("other", cells.config(r=16, seed=1))
    model.add_weighted_adapter(
        ["default", "other"], [1.0, 1.0], "mix", combination_type="cat"
    )  # of rank 32, and v_proj has 16 outputs
    assert {layer.r["mix"] for _, layer in cells.layers_of(model)} == {32}
    assert_protected(model, "mix")


def test_injection_that_fails_leaves_the_model_as_it_was() -> None:
    model = cells.base_model()
    before = {name: type(module) for name, module in model.named_modules()}
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(PeftSafetyError):
        get_peft_model(
            model, cells.config(target_modules=["q_proj"], subspace=cells.random_subspace(model, ["v_proj"]))
        )
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not hasattr(model, "peft_config")
    tuned = cells.protected(trained=True)
    expected = cells.logits(tuned)
    with pytest.raises(PeftSafetyError):
        tuned.add_adapter("bad", cells.config(subspace=cells.random_subspace(model, ["v_proj"])))
    assert list(tuned.peft_config) == ["default"]
    assert torch.equal(cells.logits(tuned), expected)
    assert_protected(tuned)


def test_the_leaf_is_what_stands_in_the_model() -> None:
    model = cells.protected("linear", "task")
    for _, layer in cells.layers_of(model):
        assert isinstance(layer.lora_A["default"], ProtectedLinear)
        assert layer.lora_A["default"].basis is None
        assert layer.lora_B["default"].basis.shape[1] == cells.K
