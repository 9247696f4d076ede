"""Adapters by transformers' own methods, by PEFT's low-level ones, and `subspace="auto"`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from transformers import AutoModelForCausalLM

from peft_safety import SaLoRAConfig, assert_protected, verify
from peft_safety.errors import ConfigError
from peft_safety.layers import protected_leaves
from tests.peft import cells
from tests.tiny import tiny_tokenizer

LEAK = 1e-6


@pytest.mark.parametrize("init", cells.INITS)
def test_transformers_adds_saves_and_loads_a_protected_adapter(init: str, tmp_path: Path) -> None:
    model = cells.base_model()
    before = cells.logits(model)
    model.add_adapter(cells.config("linear", init))
    assert torch.equal(cells.logits(model), before)
    cells.train(model, cells.adamw, 5)
    model.eval()
    assert_protected(model)
    model.disable_adapters()
    assert torch.equal(cells.logits(model), before)
    model.enable_adapters()
    expected = cells.logits(model)
    assert not torch.equal(expected, before)
    model.save_pretrained(tmp_path)
    assert verify(tmp_path).worst_leak <= LEAK

    fresh = cells.base_model()
    fresh.load_adapter(str(tmp_path), is_trainable=True)
    fresh.eval()
    assert_protected(fresh)
    cells.assert_same_factors(fresh, model)
    cells.assert_same_function(
        cells.logits(fresh), expected
    )  # transformers leaves the factors where its reader put them
    assert cells.leak(fresh) <= LEAK
    by_peft = PeftModel.from_pretrained(cells.base_model(), tmp_path)
    assert torch.equal(cells.logits(by_peft), expected)
    cells.train(fresh, cells.adamw, 3)
    assert cells.leak(fresh) <= LEAK
    fresh.delete_adapter("default")
    assert not list(protected_leaves(fresh))
    assert torch.equal(cells.logits(fresh.eval()), before)


def test_transformers_loads_what_peft_saved(tmp_path: Path) -> None:
    model = cells.protected("linear", "task", trained=True)
    model.save_pretrained(tmp_path)
    fresh = cells.base_model()
    fresh.load_adapter(str(tmp_path), adapter_name="mine")
    assert_protected(fresh, "mine")
    cells.assert_same_factors(fresh, model)
    cells.assert_same_function(cells.logits(fresh), cells.logits(model))


def test_transformers_holds_two_adapters() -> None:
    model = cells.base_model()
    model.add_adapter(LoraConfig(r=4, target_modules=cells.targets("linear"), init_lora_weights=False), "plain")
    model.add_adapter(cells.config(), "safe")
    cells.perturb(model)
    model.set_adapter("safe")
    assert_protected(model)
    assert cells.leak(model, "safe") <= LEAK
    model.delete_adapter("plain")
    assert_protected(model, "safe")


def test_a_hot_swap_by_transformers_stays_in_the_subspace_of_the_model(tmp_path: Path) -> None:
    """Its loader copies tensors only. An adapter of the same subspace is itself; one of another subspace (use peft's
    hotswap_adapter) leaks nothing.
    """
    for name, seed in (("first", 1), ("same", 1), ("other", 2)):
        cells.perturb(cells.protected(seed=seed), len(name)).save_pretrained(tmp_path / name)
    model = cells.base_model()
    model.load_adapter(str(tmp_path / "first"))
    for name in ("other", "same"):
        model.load_adapter(str(tmp_path / name), adapter_name="default", hotswap=True)
        assert_protected(model)
        assert cells.leak(model) <= LEAK
    expected = PeftModel.from_pretrained(cells.base_model(), tmp_path / "same")
    cells.assert_same_factors(model, expected)
    cells.assert_same_function(cells.logits(model), cells.logits(expected))


def test_a_refused_adapter_leaves_a_transformers_model_usable() -> None:
    model = cells.base_model()
    with pytest.raises(ConfigError):
        model.add_adapter(
            SaLoRAConfig(r=4, target_modules=["q_proj"], subspace="auto", safety_rank=4)
        )  # no tokenizer to calibrate with
    assert not any("lora" in name for name, _ in model.named_modules())
    model.add_adapter(cells.config())
    assert_protected(model)


@pytest.fixture(scope="module")
def base_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    cells.base_model().save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_the_auto_class_finds_base_and_adapter(low_cpu_mem_usage: bool, base_directory: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(base_directory)
    model = cells.perturb(get_peft_model(base, cells.config(task_type="CAUSAL_LM")))
    model.save_pretrained(tmp_path)
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert_protected(loaded)
    cells.assert_same_factors(loaded, model)
    cells.assert_same_function(cells.logits(loaded), cells.logits(model))  # the base was read twice


@pytest.mark.parametrize("init", cells.INITS)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_injection_and_plain_state_dicts_work_without_a_peft_model(low_cpu_mem_usage: bool, init: str) -> None:
    model = inject_adapter_in_model(cells.config("linear", init), cells.base_model())
    cells.perturb(model)
    assert_protected(model)
    state = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}
    other = inject_adapter_in_model(
        cells.config("linear", init), cells.base_model(), low_cpu_mem_usage=low_cpu_mem_usage
    )
    result = set_peft_model_state_dict(other, state, low_cpu_mem_usage=low_cpu_mem_usage)
    assert not result.unexpected_keys
    assert_protected(other)
    assert torch.equal(cells.logits(other), cells.logits(model))


def test_a_plain_lora_file_loaded_into_a_protected_adapter_comes_out_projected() -> None:
    """By `set_peft_model_state_dict` nobody checks where the factors come from: the leaf projects them."""
    torch.manual_seed(0)
    plain = get_peft_model(
        cells.base_model(),
        LoraConfig(r=4, lora_alpha=8, target_modules=cells.targets("linear"), init_lora_weights=False),
    )
    model = cells.protected()
    set_peft_model_state_dict(model, get_peft_model_state_dict(plain))
    assert cells.leak(plain, subspace=model.peft_config["default"].subspace) > 0.01
    assert cells.leak(model) <= LEAK


def test_auto_calibrates_at_injection(base_directory: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(base_directory)
    before = cells.logits(base)
    model = get_peft_model(base, SaLoRAConfig(r=4, target_modules=["q_proj", "down_proj"], safety_rank=6)).eval()
    assert torch.equal(cells.logits(model), before)
    subspace = model.peft_config["default"].subspace
    assert {subspace.rank(name) for name in subspace.module_names} == {6}
    assert subspace.provenance["method"] == "salora"
    cells.train(model, cells.adamw, 3)
    assert cells.leak(model) <= LEAK
    model.save_pretrained(tmp_path)
    assert_protected(PeftModel.from_pretrained(cells.base_model(), tmp_path))


def test_auto_without_a_tokenizer_says_so_and_leaves_the_model_alone() -> None:
    model = cells.base_model()
    before, types = cells.logits(model), {name: type(module) for name, module in model.named_modules()}
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ConfigError, match="tokenizer"):
        get_peft_model(model, SaLoRAConfig(r=4, target_modules=["q_proj"], safety_rank=4))
    assert {name: type(module) for name, module in model.named_modules()} == types
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(cells.logits(model), before)
