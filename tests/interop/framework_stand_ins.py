"""What our plugins take from axolotl and ms-swift, for tests without them (`tests/integrations` runs them)."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from tests.peft import cells

TARGETS = list(cells.LINEAR_TARGETS)


class Settings(dict[str, Any]):
    """A validated axolotl config: attributes are keys, and a missing key is None."""

    __getattr__ = dict.get
    __setattr__ = dict.__setitem__  # type: ignore[assignment]

    def __missing__(self, key: str) -> None:
        return None

    def to_dict(self) -> dict[str, Any]:
        return dict(self)


def load_lora(model: Any, cfg: Any, inference: bool = False, config_only: bool = False) -> tuple[Any, Any]:
    """axolotl's loader of ordinary adapters."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM")
    if config_only:
        return None, config
    if cfg.lora_model_dir:
        return PeftModel.from_pretrained(model, cfg.lora_model_dir, is_trainable=not inference), config
    return get_peft_model(model, config), config


@torch.no_grad()
def redraw(model: Any) -> None:
    """Every `lora_A` anew, whoever made it, as axolotl's loader does since 0.20."""
    for module in model.modules():
        for factor in getattr(module, "lora_A", {}).values():
            factor.weight.copy_(torch.randn(factor.weight.shape) / factor.weight.shape[1] ** 0.5)


def loaded(plugin: Any, cfg: Settings, model: Any) -> Any:
    """The model, after the calls of a plugin in the order of axolotl's ModelLoader.load."""
    plugin.pre_lora_load(cfg, model)
    if cfg.rl in ("dpo", "ipo", "kto") and not cfg.merge_lora:
        _, config = plugin.load_adapter(model, cfg, inference=False, config_only=True)
    else:
        model, config = plugin.load_adapter(model, cfg)
    plugin.post_lora_load(cfg, model)
    if config is not None and not cfg.lora_model_dir and config.init_lora_weights is True:
        redraw(model)
    plugin.post_model_load(cfg, model)
    return model


class BasePlugin:
    def pre_lora_load(self, cfg: Any, model: Any) -> None:
        """Nothing, and so do the others."""

    post_lora_load = post_model_load = pre_lora_load


def install(patch: pytest.MonkeyPatch, modules: dict[str, dict[str, Any]], ours: str) -> None:
    """Put stand-ins in `sys.modules`, and forget our module that imports them."""
    for name, content in modules.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        patch.setitem(sys.modules, name, module)
    patch.delitem(sys.modules, ours, raising=False)


def install_axolotl(patch: pytest.MonkeyPatch) -> None:
    capabilities = {"AdapterCapabilities": SimpleNamespace, "BasePlugin": BasePlugin}
    modules: dict[str, dict[str, Any]] = {"axolotl": {}, "axolotl.integrations": {}, "axolotl.loaders": {}}
    modules |= {"axolotl.integrations.base": capabilities, "axolotl.loaders.adapter": {"load_lora": load_lora}}
    install(patch, modules, "peft_safety.integrations.axolotl")


class PeftTuner:
    from_pretrained = staticmethod(PeftModel.from_pretrained)


def install_swift(patch: pytest.MonkeyPatch) -> None:
    tuner = {"get_modules_to_save": lambda args, model, kind: [], "get_target_modules": lambda args, model: TARGETS}
    modules: dict[str, dict[str, Any]] = {"swift": {}, "swift.pipelines": {}, "swift.pipelines.train": {}}
    modules |= {"swift.pipelines.train.tuner": tuner, "swift.tuner_plugin": {"PeftTuner": PeftTuner, "tuners_map": {}}}
    install(patch, modules, "peft_safety.integrations.ms_swift")
