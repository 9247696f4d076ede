"""An injection or a load that fails leaves the model bit for bit as it was, an adapter of the same name included."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft.peft_model
import pytest
import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from peft_safety import SafetySubspace, SaLoRAConfig, assert_protected
from peft_safety.errors import ArtifactError, ConfigError, PeftSafetyError, SubspaceError
from peft_safety.layers.adapters import config_table
from tests.hostile import tools
from tests.tiny import tiny_llama

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("quiet")]


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """The function, the very modules, PEFT's table with the configs in it, and the active adapters stay too."""
    ids = tools.tokens()
    modules, table = dict(model.named_modules()), config_table(model)
    configs = {name: (config, dict(vars(config))) for name, config in table.items()}
    active = [(m, list(m.active_adapters), dict(m.r), dict(m.scaling)) for m in modules.values() if _is_layer(m)]
    expected = model(input_ids=ids).logits
    with tools.unchanged(model):
        yield
    assert list(dict(model.named_modules()).items()) == list(modules.items())
    assert config_table(model) is table if configs else not config_table(model)
    assert {name: (config, dict(vars(config))) for name, config in table.items()} == configs
    assert [(m, list(m.active_adapters), dict(m.r), dict(m.scaling)) for m, *_ in active] == active
    assert torch.equal(model(input_ids=ids).logits, expected)
    if configs:
        assert_protected(model)


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, LoraLayer)


@pytest.mark.parametrize("own", ["peft", "transformers"])
def test_a_failed_injection_under_a_name_in_use_leaves_the_old_adapter(own: str, space: SafetySubspace) -> None:
    model = tools.trained(tiny_llama(), space)
    if own == "transformers":
        model = tiny_llama()
        model.add_adapter(SaLoRAConfig(r=4, subspace=space, target_modules="all-linear"), "default")
        model.eval()
    inner = model.get_base_model() if own == "peft" else model
    fewer = SaLoRAConfig(r=2, subspace=space.restricted([tools.Q0]), target_modules="all-linear")
    for config, error in ((fewer, SubspaceError), (LoraConfig(r=2, target_modules=["q_proj"]), ConfigError)):
        with untouched(model), pytest.raises(error):
            inject_adapter_in_model(config, inner, "default")


def test_a_load_that_fails_between_two_tensors_is_undone(
    space: SafetySubspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = tools.save_good(tmp_path / "good")
    other = tools.save_good(tmp_path / "other", seed=5)
    original = peft.peft_model.set_peft_model_state_dict

    def half(model: nn.Module, state: dict[str, Any], **options: Any) -> Any:
        original(model, {key: state[key] for key in list(state)[::2]}, **options)
        raise KeyError("half of it is loaded")

    model, base = PeftModel.from_pretrained(tiny_llama(), str(good)), tiny_llama()
    monkeypatch.setattr(peft.peft_model, "set_peft_model_state_dict", half)
    calls: tuple[tuple[nn.Module, Callable[[], Any]], ...] = (
        (model, lambda: model.load_adapter(str(other), "default")),
        (model, lambda: model.load_adapter(str(other), "second")),
        (base, lambda: PeftModel.from_pretrained(base, str(other))),
    )
    for changed, call in calls:
        with untouched(changed), pytest.raises(ArtifactError, match="half"):
            call()
    monkeypatch.undo()
    model.load_adapter(str(other), "default")
    with torch.no_grad():
        expected = PeftModel.from_pretrained(tiny_llama(), str(other))(tools.tokens()).logits
        assert torch.equal(model(tools.tokens()).logits, expected)


def test_plain_peft_is_left_as_it_is(tmp_path: Path) -> None:
    """A failing plain load is PEFT's own affair."""
    base = tiny_llama()
    with pytest.raises(ValueError, match="adapter_config") as caught:
        PeftModel.from_pretrained(base, str(tmp_path))
    assert not isinstance(caught.value, PeftSafetyError)
