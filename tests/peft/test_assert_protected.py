"""`assert_protected` passes while the protection stands, and names the module when it doesn't."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_safety import assert_protected
from peft_safety.errors import ProtectionError
from tests.peft import cells

NAME = "model.layers.1.self_attn.v_proj"


def plain_linear(layer: nn.Module) -> None:
    old = layer.lora_B["default"]
    layer.lora_B["default"] = nn.Linear(old.in_features, old.out_features, bias=False)


def wrong_basis(layer: nn.Module) -> None:
    layer.lora_B["default"].basis = layer.lora_B["default"].basis.flip(0)


def narrower_basis(layer: nn.Module) -> None:
    layer.lora_B["default"].basis = layer.lora_B["default"].basis[:, :-1]


def no_basis(layer: nn.Module) -> None:
    layer.lora_B["default"].basis = None


def bf16_basis(layer: nn.Module) -> None:
    layer.lora_B["default"].basis = layer.lora_B["default"].basis.to(torch.bfloat16)


def not_a_number(layer: nn.Module) -> None:
    layer.lora_B["default"].weight.data[0, 0] = float("nan")


def infinite(layer: nn.Module) -> None:
    layer.lora_B["default"].weight.data[0, 0] = float("inf")


def removed(layer: nn.Module) -> None:
    layer.delete_adapter("default")


BREAKS: list[Callable[[nn.Module], None]] = [
    plain_linear,
    wrong_basis,
    narrower_basis,
    no_basis,
    bf16_basis,
    not_a_number,
    infinite,
    removed,
]


@pytest.mark.parametrize("init", cells.INITS)
@pytest.mark.parametrize("damage", BREAKS, ids=lambda damage: damage.__name__)
def test_lost_protection_is_found_and_named(damage: Callable[[nn.Module], None], init: str) -> None:
    model = cells.protected("linear", init, trained=True)
    assert_protected(model)
    damage(dict(cells.layers_of(model))[NAME])
    with pytest.raises(ProtectionError, match=NAME):
        assert_protected(model)


def test_a_frozen_factor_that_is_not_finite_is_found() -> None:
    model = cells.protected("linear", "task", trained=True)
    dict(cells.layers_of(model))[NAME].lora_B["default"].initial[0, 0] = float("nan")
    with pytest.raises(ProtectionError, match=NAME):
        assert_protected(model)


def test_a_lost_factor_of_a_residual_is_found() -> None:
    """The constrained side may be intact and the update wrong all the same: `[A; A0]` and `[C B, -C B0]` belong
    together.
    """
    model = cells.protected("linear", "task", trained=True)
    layer = dict(cells.layers_of(model))[NAME]
    layer.lora_A["default"] = nn.Linear(layer.in_features, 4, bias=False)
    with pytest.raises(ProtectionError, match=NAME):
        assert_protected(model)


@pytest.mark.parametrize("base", cells.BASES)
def test_a_sound_model_passes_by_whichever_handle_it_is_held(base: str) -> None:
    model = cells.protected(base, trained=True)
    for handle in (model, model.base_model, model.get_base_model()):
        assert_protected(handle)
        assert_protected(handle, "default")


def test_an_adapter_that_is_not_there_is_not_protected() -> None:
    model = cells.protected()
    with pytest.raises(ProtectionError, match="'other'"):
        assert_protected(model, "other")
    with pytest.raises(ProtectionError):
        assert_protected(get_peft_model(cells.base_model(), LoraConfig(target_modules=["q_proj"])))


def test_an_ordinary_adapter_that_is_active_beside_it_is_refused() -> None:
    model = cells.protected(trained=True)
    model.add_adapter("plain", LoraConfig(r=2, target_modules=["q_proj"]))
    assert_protected(model)
    model.base_model.set_adapter(["default", "plain"])
    with pytest.raises(ProtectionError, match=r"plain.*together with.*default"):
        assert_protected(model)
    with model.disable_adapter():
        assert_protected(model)
    model.set_adapter("plain")
    assert_protected(model)


def test_an_ordinary_adapter_that_is_merged_beside_it_is_refused() -> None:
    model = cells.protected(trained=True)
    model.add_adapter("plain", LoraConfig(r=2, target_modules=["q_proj"]))
    model.merge_adapter(["plain"])
    with pytest.raises(ProtectionError, match=r"plain.*together with.*default"):
        assert_protected(model)
    with pytest.raises(ProtectionError, match=r"plain.*together with.*default"):
        model.merge_adapter(["default"])
    model.unmerge_adapter()
    assert_protected(model)
    model.merge_adapter(["default"])
    assert_protected(model)


def test_the_factors_that_the_forward_uses_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    model = cells.protected(trained=True)
    leaf = dict(cells.layers_of(model))[NAME].lora_B["default"]
    with torch.no_grad():
        leaf.raw().add_(1.0)
    assert_protected(model)
    monkeypatch.setattr(leaf, "projected", leaf.raw)
    with pytest.raises(ProtectionError, match=rf"{NAME}.*leaks"):
        assert_protected(model)
