"""Every road by which PEFT, transformers or a caller of PEFT's parts makes LoRA layers from a protected config:
protected, or refused with a typed error.
"""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftConfig, PeftMixedModel, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import LoraModel
from peft.tuners.lora import layer as lora_layer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from peft_safety import GuardSpaceConfig, SaLoRAConfig, assert_protected
from peft_safety.core.projection import leak
from peft_safety.errors import ArtifactError, ConfigError, PeftSafetyError, SubspaceError
from peft_safety.layers import protected_leaves
from tests.peft import cells
from tests.tiny import tiny_tokenizer

LEAK = 1e-6
Road = Callable[[Any], tuple[Any, str]]


def by_transformers(config: Any) -> tuple[Any, str]:
    model = cells.base_model()
    model.add_adapter(config, "mine")
    return model, "mine"


def beside_another(config: Any) -> tuple[Any, str]:
    model = cells.plain()
    model.add_adapter("second", config)
    model.set_adapter("second")
    return model, "second"


def mixed_beside_loha(config: Any) -> tuple[Any, str]:
    model = get_peft_model(cells.base_model(), LoHaConfig(r=2, target_modules=["q_proj", "o_proj"]), mixed=True)
    model.add_adapter("second", config)
    model.set_adapter("second")
    return model, "second"


def mixed_under_loha(config: Any) -> tuple[Any, str]:
    model = get_peft_model(cells.base_model(), config, mixed=True)
    model.add_adapter("loha", LoHaConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("default")
    return model, "default"


def weighted(config: Any) -> tuple[Any, str]:
    model = cells.perturb(get_peft_model(cells.base_model(), config))
    model.add_weighted_adapter(["default"], [0.5], "reduced", combination_type="svd")
    model.set_adapter("reduced")
    return model, "reduced"


ROADS: dict[str, Road] = {
    "get_peft_model": lambda c: (get_peft_model(cells.base_model(), c), "default"),
    "another_name": lambda c: (get_peft_model(cells.base_model(), c, adapter_name="mine"), "mine"),
    "no_autocast": lambda c: (get_peft_model(cells.base_model(), c, autocast_adapter_dtype=False), "default"),
    "constructor": lambda c: (PeftModel(cells.base_model(), c), "default"),
    "constructor_of_a_task": lambda c: (peft.PeftModelForCausalLM(cells.base_model(), c, "mine"), "mine"),
    "inject_adapter_in_model": lambda c: (inject_adapter_in_model(c, cells.base_model(), "mine"), "mine"),
    "tuner": lambda c: (LoraModel(cells.base_model(), c, "mine").model, "mine"),
    "tuner_of_a_table": lambda c: (LoraModel(cells.base_model(), {"mine": c}, "mine").model, "mine"),
    "transformers": by_transformers,
    "add_adapter": beside_another,
    "mixed": lambda c: (get_peft_model(cells.base_model(), c, mixed=True), "default"),
    "mixed_constructor": lambda c: (PeftMixedModel(cells.base_model(), c, "mine"), "mine"),
    "mixed_beside_loha": mixed_beside_loha,
    "mixed_under_loha": mixed_under_loha,
    "weighted_sum": weighted,
    "copied_config": lambda c: (get_peft_model(cells.base_model(), copy.copy(c)), "default"),
    "deeply_copied_config": lambda c: (get_peft_model(cells.base_model(), copy.deepcopy(c)), "default"),
    "replaced_config": lambda c: (get_peft_model(cells.base_model(), dataclasses.replace(c)), "default"),
    "pickled_config": lambda c: (get_peft_model(cells.base_model(), pickle.loads(pickle.dumps(c))), "default"),
}


@pytest.mark.parametrize("init", cells.INITS)
@pytest.mark.parametrize("road", ROADS)
def test_a_new_adapter_is_protected_whichever_road_made_it(road: str, init: str) -> None:
    if road == "weighted_sum" and init == "task":
        with pytest.raises(ConfigError, match="residual"):
            ROADS[road](cells.config("linear", init))
        return
    model, adapter = ROADS[road](cells.config("linear", init))
    assert_protected(model, adapter)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name and f".{adapter}." in name)
    cells.train(model, cells.adamw, 3)
    assert cells.leak(model, adapter) <= LEAK
    assert_protected(model, adapter)


LOADS: dict[str, Callable[[Path], tuple[Any, str]]] = {
    "from_pretrained": lambda d: (PeftModel.from_pretrained(cells.base_model(), d, is_trainable=True), "default"),
    "low_memory": lambda d: (
        PeftModel.from_pretrained(cells.base_model(), d, is_trainable=True, low_cpu_mem_usage=True),
        "default",
    ),
    "given_config": lambda d: (
        PeftModel.from_pretrained(cells.base_model(), d, is_trainable=True, config=PeftConfig.from_pretrained(d)),
        "default",
    ),
    "mixed": lambda d: (PeftMixedModel.from_pretrained(cells.base_model(), d, "mine", is_trainable=True), "mine"),
    "mixed_low_memory": lambda d: (
        PeftMixedModel.from_pretrained(cells.base_model(), d, "mine", is_trainable=True, low_cpu_mem_usage=True),
        "mine",
    ),
    "mixed_beside_loha": lambda d: (mixed_load(d), "mine"),
    "load_adapter": lambda d: (second_load(d), "mine"),
    "transformers": lambda d: (transformers_load(d), "mine"),
}


def second_load(directory: Path) -> Any:
    model = cells.plain()
    model.load_adapter(directory, "mine", is_trainable=True)
    model.set_adapter("mine")
    return model


def mixed_load(directory: Path) -> Any:
    model = get_peft_model(cells.base_model(), LoHaConfig(r=2, target_modules=["q_proj", "o_proj"]), mixed=True)
    model.load_adapter(directory, "mine", is_trainable=True)
    model.set_adapter("mine")
    return model


def transformers_load(directory: Path) -> Any:
    model = cells.base_model()
    model.load_adapter(str(directory), adapter_name="mine", is_trainable=True)
    return model


@pytest.mark.parametrize("init", cells.INITS)
@pytest.mark.parametrize("road", LOADS)
def test_a_loaded_adapter_is_protected_and_computes_what_was_saved(road: str, init: str, tmp_path: Path) -> None:
    saved = cells.protected("linear", init, trained=True)
    saved.save_pretrained(tmp_path)
    model, adapter = LOADS[road](tmp_path)
    torch.testing.assert_close(cells.logits(model.eval()), cells.logits(saved), rtol=1e-5, atol=1e-5)
    cells.train(model, cells.adamw, 3)
    assert_protected(model, adapter)
    assert cells.leak(model, adapter) <= LEAK


def test_another_adapter_than_the_one_that_is_there_is_refused(tmp_path: Path) -> None:
    cells.protected("linear").save_pretrained(tmp_path)
    both = r"rank 4 and 2 at \S*layers\.0\.mlp\.down_proj \(\d+ of \d+ modules differ"
    with pytest.raises(ArtifactError, match=both):
        cells.protected("linear", r=2).load_adapter(tmp_path, "default")
    with pytest.raises(ArtifactError, match="are without and with initial factors"):
        cells.protected("linear", "task").load_adapter(tmp_path, "default")


def test_loading_an_adapter_folds_those_beside_it_as_eval_does(tmp_path: Path) -> None:
    cells.protected("linear", "lora", trained=True).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(cells.base_model(), tmp_path, is_trainable=True)
    cells.train(model, cells.adamw, 3)
    assert raw_leak(model) > LEAK, "an optimizer moves raw weights out of the complement"
    model.load_adapter(tmp_path, "other", is_trainable=True)
    assert model.training
    assert raw_leak(model) > LEAK, "a model that trains is left alone"
    model.load_adapter(tmp_path, "third")
    assert not model.training
    assert raw_leak(model) <= LEAK


def raw_leak(model: nn.Module) -> float:
    """Of the parameters as they are, read past the fold."""
    return max(leak(leaf.basis, leaf.raw().detach()) for _, leaf in protected_leaves(model) if leaf.basis is not None)


@pytest.mark.parametrize("init", cells.INITS)
def test_an_adapter_made_from_a_loaded_config_alone_changes_nothing_yet(init: str, tmp_path: Path) -> None:
    cells.protected("linear", init, trained=True).save_pretrained(tmp_path)
    model = get_peft_model(cells.base_model(), PeftConfig.from_pretrained(tmp_path)).eval()
    torch.testing.assert_close(cells.logits(model), cells.logits(cells.base_model()), rtol=1e-5, atol=1e-5)


def test_a_mixed_model_calibrates_by_itself(tmp_path: Path) -> None:
    cells.base_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    base = type(cells.base_model()).from_pretrained(tmp_path)
    model = get_peft_model(base, LoHaConfig(r=2, target_modules=["o_proj"]), mixed=True)
    model.add_adapter("safe", GuardSpaceConfig(r=4, target_modules=["q_proj"], init="guardspace"))
    assert_protected(model, "safe")


def test_a_mixed_model_merges_what_it_computes() -> None:
    model = cells.perturb(get_peft_model(cells.base_model(), cells.config("linear", "task"), mixed=True))
    expected = cells.logits(model)
    torch.testing.assert_close(cells.logits(model.merge_and_unload()), expected, rtol=1e-4, atol=1e-4)


# --- layers made past the injection


def replaced(config: Any) -> nn.Module:
    model = LoraModel(cells.base_model(), LoraConfig(r=2, target_modules=["k_proj"]), "plain")
    attention = model.model.model.layers[0].self_attn
    model._create_and_replace(
        config, "mine", attention.q_proj, "q_proj", attention, current_key="model.layers.0.self_attn.q_proj"
    )
    return model


def updated(config: Any) -> nn.Module:
    model = cells.plain()
    next(layer for _, layer in cells.layers_of(model)).update_layer("mine", 4, lora_alpha=8, config=config)
    return model


PARTS: dict[str, Callable[[Any], Any]] = {
    "create_and_replace": replaced,
    "update_layer": updated,
    "linear": lambda c: lora_layer.Linear(nn.Linear(8, 8), "mine", config=c, r=4, lora_alpha=8),
    "embedding": lambda c: lora_layer.Embedding(nn.Embedding(8, 8), "mine", config=c, r=4, lora_alpha=8),
    "conv": lambda c: lora_layer.Conv2d(nn.Conv2d(8, 8, 1), "mine", config=c, r=4, lora_alpha=8),
}


@pytest.mark.parametrize("part", PARTS)
def test_a_layer_made_past_the_injection_is_refused(part: str) -> None:
    PARTS[part](LoraConfig(r=4, lora_alpha=8))
    for config in (cells.config(), get_peft_model(cells.base_model(), cells.config()).peft_config["default"]):
        with pytest.raises(ConfigError, match="would not be protected"):
            PARTS[part](config)


def test_a_refused_layer_leaves_the_model_as_it_was() -> None:
    model = LoraModel(cells.base_model(), LoraConfig(r=2, target_modules=["k_proj"]), "plain")
    before, logits = {name: type(module) for name, module in model.named_modules()}, cells.logits(model)
    attention = model.model.model.layers[0].self_attn
    with pytest.raises(ConfigError):
        model._create_and_replace(
            cells.config(),
            "mine",
            attention.q_proj,
            "q_proj",
            attention,
            current_key="model.layers.0.self_attn.q_proj",
        )
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert torch.equal(cells.logits(model), logits)


@pytest.mark.parametrize("mixed", [False, True])
def test_a_refusal_leaves_no_trace_in_any_kind_of_model(mixed: bool) -> None:
    model = get_peft_model(cells.base_model(), LoraConfig(r=2, target_modules=["o_proj"]), mixed=mixed)
    before = {name: type(module) for name, module in model.named_modules()}
    config = SaLoRAConfig(
        r=4, target_modules=["q_proj", "embed_tokens"], subspace=cells.random_subspace(cells.base_model(), ["q_proj"])
    )
    with pytest.raises(SubspaceError, match="embed_tokens"):
        model.add_adapter("mine", config)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert "mine" not in model.peft_config


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_mixed_model_of_few_bits_is_refused_as_peft_refuses_it(kind: str) -> None:
    with pytest.raises(PeftSafetyError, match="quantization not supported"):
        get_peft_model(cells.base_model(kind), cells.config(kind), mixed=True)


@pytest.mark.parametrize("tuner", [peft.AdaLoraModel, peft.LoHaModel, peft.IA3Model])
def test_another_tuner_cannot_take_a_protected_config_for_its_own(tuner: Any) -> None:
    model = cells.base_model()
    with pytest.raises(ConfigError, match=tuner.__name__):
        tuner(model, cells.config(), "default")
    assert not any(isinstance(module, BaseTunerLayer) for module in model.modules())


def test_a_plain_adapter_by_the_same_roads_stays_plain() -> None:
    for road in ("tuner", "mixed", "transformers", "mixed_beside_loha"):
        model, _ = ROADS[road](LoraConfig(r=4, target_modules=["q_proj"]))
        assert not list(protected_leaves(model))


@pytest.mark.parametrize(
    "road", [get_peft_model, lambda m, c: inject_adapter_in_model(c, m.get_base_model(), "default")]
)
def test_an_ordinary_config_under_the_name_of_a_protected_adapter_is_refused(road: Callable[..., Any]) -> None:
    model = cells.protected(trained=True)
    leaves = [name for name, _ in protected_leaves(model)]
    before = cells.logits(model)
    with pytest.raises(ConfigError, match="'default' is protected"):
        road(model, LoraConfig(r=4, target_modules=cells.targets("linear")))
    assert [name for name, _ in protected_leaves(model)] == leaves
    torch.testing.assert_close(cells.logits(model), before)
    get_peft_model(cells.base_model(), LoraConfig(r=4, target_modules=cells.targets("linear")))  # elsewhere it may
