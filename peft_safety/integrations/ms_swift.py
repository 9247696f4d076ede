"""ms-swift: `swift sft --external_plugins FILE --tuner_type guardspace`, where FILE imports this module.

Written against ms-swift 4.6.0.
"""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, get_peft_model
from swift.pipelines.train.tuner import get_modules_to_save, get_target_modules
from swift.tuner_plugin import PeftTuner, tuners_map
from torch import nn

from peft_safety.errors import ConfigError
from peft_safety.integrations.configs import METHODS, protected_config
from peft_safety.registry.protection import assert_protected

TASK_TYPES = {"EMBEDDING": None, "RERANKER": "SEQ_CLS", "GENERATIVE_RERANKER": "CAUSAL_LM", "DECISION": "CAUSAL_LM"}
"""PEFT's task types for ms-swift's own ones, as its LoRA takes them."""
SWIFT_ONLY = ("lorap_lr_ratio", "lora_dtype")
"""Arguments of ms-swift's own LoRA classes, which a protected adapter cannot follow."""


class ProtectedTuner(PeftTuner):  # type: ignore[misc]
    """A tuner that trains an adapter of a method with options; see `register`."""

    def __init__(self, method: str, options: dict[str, Any]) -> None:
        protected_config(method, LoraConfig(), options)  # wrong options are refused before a model is loaded
        self.method, self.options = method, options

    def prepare_model(self, args: Any, model: nn.Module) -> nn.Module:
        """The model with a new adapter, of the size that ms-swift's own LoRA arguments name.

        Raises:
            ConfigError: an argument that would have no effect, or a LoRA feature that cannot be protected.
        """
        for name in SWIFT_ONLY:
            if (value := getattr(args, name, None)) is not None:
                raise ConfigError(f"--{name} {value} has no effect on --tuner_type {self.method}. Leave it out.")
        task_type = args.task_type.upper()
        lora = LoraConfig(
            r=args.lora_rank,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            bias=args.lora_bias,
            use_rslora=args.use_rslora,
            use_dora=args.use_dora,
            init_lora_weights=args.init_weights,
            target_modules=get_target_modules(args, model),
            target_parameters=args.target_parameters,
            modules_to_save=get_modules_to_save(args, model, args.task_type) or None,
            task_type=TASK_TYPES.get(task_type, task_type),
        )
        return get_peft_model(model, protected_config(self.method, lora, self.options))

    def from_pretrained(self, model: nn.Module, model_id: str, **kwargs: Any) -> nn.Module:
        """The model with a saved adapter, which must be a protected one."""
        model = PeftTuner.from_pretrained(model, model_id, **kwargs)
        assert_protected(model, kwargs.get("adapter_name", "default"))
        return model


def register(method: str = "guardspace", **options: Any) -> None:
    """Make `--tuner_type METHOD` mean this method with these options. Importing the module registers every method
    without options.

    Args:
        method: "guardspace" or "salora".
        options: the config's own fields, such as `subspace="subspace.safetensors"`; `task_data` names a file of JSON
            lines.

    Raises:
        ConfigError: an unknown method or option.
        DataError: a file without rows.
    """
    tuners_map[method] = ProtectedTuner(method, options)


for name in METHODS:
    register(name)
