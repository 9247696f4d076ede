"""A command's settings from a YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft_safety.core import files
from peft_safety.errors import ConfigError


def read_config(path: Path) -> dict[str, Any]:
    """A YAML mapping of at most 1 MiB; nothing in it can run code."""
    import yaml

    remedy = "Give a file of 'name: value' lines, a name for each option."
    try:
        text = path.read_bytes()
        config = yaml.safe_load(text) if len(text) <= files.MAX_JSON_BYTES else None
    except (OSError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {str(error)[:300]}. {remedy}") from error
    if not isinstance(config, dict) or not all(isinstance(key, str) for key in config):
        raise ConfigError(f"{path} is not a mapping of at most {files.MAX_JSON_BYTES} bytes. {remedy}")
    return config
