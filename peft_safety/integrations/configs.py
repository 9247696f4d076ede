"""A protected config from a framework's own LoRA settings and the user's options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from peft import LoraConfig

from peft_safety.data import rows_of
from peft_safety.errors import ConfigError
from peft_safety.methods.base import ProtectedConfig
from peft_safety.recipes.adapter import TASK_ROWS, adapter_config

METHODS = ("guardspace", "salora")
"""Names of adapters that a framework's config file may ask for."""
LORA_FIELDS = {entry.name for entry in fields(LoraConfig) if entry.init}
ROWS = ("task_data", "init_data")
"""Options that name a file of rows."""


def protected_config(method: str, lora: LoraConfig, options: Mapping[str, Any]) -> ProtectedConfig:
    """The config of a method with the LoRA settings of `lora`.

    Args:
        method: one of `METHODS`; GuardSpace freezes A (`train="B"`) unless an option says otherwise.
        lora: the config that the framework would have used.
        options: the method's own fields. `task_data` and `init_data` are JSON-lines files; their first 128 rows are
            read.

    Raises:
        ConfigError: an unknown method, an option that is the framework's or nobody's, a LoRA feature that cannot be
            protected.
        DataError: a file that is missing or has no rows.
    """
    if method not in METHODS:
        raise ConfigError(f"adapter {method!r} is unknown. Choose one of {', '.join(METHODS)}.")
    twice = sorted(LORA_FIELDS & set(options))
    if twice:
        raise ConfigError(f"option {twice[0]!r} of {method!r} is LoRA's. Set it by the framework's own key.")
    settings = {name: getattr(lora, name) for name in LORA_FIELDS - {"task_type"}}
    rows = {name: rows_of(options[name], name)[:TASK_ROWS] for name in ROWS if options.get(name) is not None}
    config = adapter_config(method, **settings, **{**options, **rows})
    config.task_type = lora.task_type
    assert isinstance(config, ProtectedConfig)
    return config
