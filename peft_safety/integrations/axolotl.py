"""axolotl: `adapter: guardspace` (or `salora`) in the YAML file, with this plugin under `plugins:`.

Written against axolotl 0.19.0 to 0.21.0.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_safety.callbacks import SafetyMonitorCallback, TaskDirectionsCallback
from peft_safety.errors import ConfigError, ProtectionError, extra
from peft_safety.integrations.configs import METHODS, protected_config
from peft_safety.layers.adapters import adapter_layers, tables, weights_of
from peft_safety.layers.protected_linear import is_here
from peft_safety.methods.base import ProtectedConfig
from peft_safety.registry.protection import assert_protected, protected_configs

with extra("axolotl", "the plugin needs axolotl"):
    from axolotl.integrations.base import AdapterCapabilities, BasePlugin
    from axolotl.loaders.adapter import load_lora
    from pydantic import BaseModel, Field, model_validator

EARLY_KERNELS = ("lora_qkv_kernel", "lora_o_kernel")
"""Kernels for which axolotl replaces the attention's forward before the adapter is made, which it needs then."""
KERNELS = (*EARLY_KERNELS, "lora_mlp_kernel", "lora_embedding_kernel")


class GuardSpaceArgs(BaseModel):
    """The plugin's own key. Its values are the fields of the method's config."""

    peft_safety: dict[str, Any] | None = Field(
        default=None,
        json_schema_extra={"description": "Options of the protected adapter: subspace, safety_rank, task_data, ..."},
    )

    @model_validator(mode="after")
    def check_options(self) -> GuardSpaceArgs:
        """Refuse wrong options before a model is loaded. axolotl quantizes for its own adapters only, so on a 4-bit or
        8-bit base the adapter goes by their name, `qlora` or `lora`, until it is made.
        """
        settings: Any = self  # axolotl makes one class of its own schema and this one
        options = dict(self.peft_safety or {})
        kept = options.pop("method", None)  # of a config that was validated before
        method = settings.adapter if settings.adapter in METHODS else kept
        if method is None:
            if self.peft_safety is not None:
                given = f"adapter: {settings.adapter} has no options under peft_safety"
                raise ConfigError(f"{given}. Set adapter: {' or '.join(METHODS)}.")
            return self
        config = protected_config(method, LoraConfig(), options)
        self.peft_safety = {**options, "method": method}
        if settings.load_in_4bit or settings.load_in_8bit:
            settings.adapter = "qlora" if settings.load_in_4bit else "lora"
        if settings.merge_lora and not config.freezes:
            settings.merge_method = "legacy"  # the other one reads plain factors from the file, whatever the type
        return self


class GuardSpacePlugin(BasePlugin):  # type: ignore[misc]
    """Makes, loads and watches protected adapters in axolotl."""

    def __init__(self) -> None:
        super().__init__()
        self.rows_of_trainer = False  # whether the frozen factors are still to be made from the training rows

    def get_input_args(self) -> str:
        return f"{GuardSpaceArgs.__module__}.{GuardSpaceArgs.__name__}"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        """Not `lora_like`: what axolotl makes by itself for such adapters is an ordinary LoRA."""
        return [AdapterCapabilities(name=method) for method in METHODS]

    def pre_lora_load(self, cfg: Any, model: Any) -> None:
        """The adapter's own name, for `load_adapter`."""
        if method_of(cfg):
            cfg.adapter = method_of(cfg)

    def load_adapter(
        self, model: Any, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple[Any, ProtectedConfig | None] | None:
        """A protected adapter on the model; with `config_only`, its config for a trainer that injects it.

        A new adapter comes without its config: from 0.20 on, axolotl draws every `lora_A` anew where it gets one with
        `init_lora_weights=True`. Its other uses are telemetry, a copy in `output_dir` before training, and trainers
        that make an adapter themselves.

        Raises:
            ConfigError: a LoRA feature that cannot be protected, a fused kernel beside trained factors A, or
                `lora_model_dir` for a trainer that injects a new adapter.
            ProtectionError: `lora_model_dir` is an ordinary adapter.
        """
        if cfg.adapter not in METHODS:
            return None
        self.rows_of_trainer = False
        if cfg.lora_model_dir and config_only:
            raise ConfigError(
                f"rl: {getattr(cfg.rl, 'value', cfg.rl)} makes a new adapter, and would ignore lora_model_dir: "
                f"{cfg.lora_model_dir}. Leave one of them out."
            )
        if cfg.lora_model_dir:
            model, _ = load_lora(model, cfg, inference=inference)
            assert_protected(model, "default")
            return model, model.peft_config["default"]
        options = {name: value for name, value in cfg.peft_safety.to_dict().items() if name != "method"}
        _, lora = load_lora(model, cfg, config_only=True)
        config = protected_config(cfg.adapter, lora, options)
        kernels = [name for name in KERNELS if cfg[name]]
        if kernels and not config.freezes:
            raise ConfigError(f"{kernels[0]} computes past the protected layers. Set it to false, or use train: B.")
        self.rows_of_trainer = config.freezes and config.task_data is None and "a_init" not in options
        if self.rows_of_trainer:
            config.a_init = "random"  # until training begins
        if config_only:
            return None, config
        early = [name for name in EARLY_KERNELS if cfg[name]]
        if early and (config.subspace == "auto" or config.task_data is not None):
            raise ConfigError(
                f"{early[0]} changes the attention, which cannot run before it has its adapter. Give subspace a file "
                "and leave out task_data, or set it to false."
            )
        cast = cfg.peft_autocast_adapter_dtype
        return get_peft_model(model, config, **({} if cast is None else {"autocast_adapter_dtype": cast})), None

    def post_model_load(self, cfg: Any, model: Any) -> None:
        """The last word, after all that axolotl does to a model with its adapter.

        Raises:
            ProtectionError: the adapter is not protected, or a new one does not start from a zero update.
        """
        if not (method_of(cfg) and protected_configs(model)):
            return  # a trainer injects it
        assert_protected(model, "default")
        if not cfg.lora_model_dir:
            check_start(model)

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        """The check of the protection, and where no `task_data` were given, the directions of the training rows."""
        if not method_of(cfg):
            return []
        return [*([TaskDirectionsCallback()] if self.rows_of_trainer else []), SafetyMonitorCallback()]


def method_of(cfg: Any) -> str | None:
    """The method that a validated axolotl config asks for."""
    return cfg.peft_safety.method if cfg.peft_safety else None


@torch.no_grad()
def check_start(model: nn.Module, adapter_name: str = "default") -> None:
    """Refuse, by a ProtectionError, a new adapter whose update is not zero. Factors that are not here (sharded, or on
    the meta device) are not seen.
    """
    config = protected_configs(model)[adapter_name]
    if config.init_lora_weights is not True:
        return
    layers = adapter_layers(model, adapter_name)
    for name, layer in layers.items():
        pair = weights_of(layer, adapter_name)
        if not all(is_here(weight) for weight in pair):
            continue
        if config.residual:
            initial = [table[adapter_name].initial for table in tables(layer)]
            zero = all(torch.equal(weight, value.to(weight)) for weight, value in zip(pair, initial, strict=True))
        else:
            zero = not all(bool(weight.any()) for weight in pair)
        if not zero:
            raise ProtectionError(
                f"{name}: the update of the new adapter is not zero. axolotl, or another plugin, has changed its "
                "factors after they were made. Leave out that plugin, or use a release of axolotl that was tested."
            )
