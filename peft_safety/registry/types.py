"""The methods of this package: PEFT's name for each is its `PEFT_KEY`."""

from __future__ import annotations

from typing import Any

from peft_safety.methods.guardspace import GuardSpaceConfig
from peft_safety.methods.ortho_patch import OrthoSafetyPatchConfig
from peft_safety.methods.safe_lora import SafeLoRAConfig
from peft_safety.methods.salora import SaLoRAConfig

METHODS: tuple[Any, ...] = (SaLoRAConfig, SafeLoRAConfig, OrthoSafetyPatchConfig, GuardSpaceConfig)
"""The config class of each method. A new method is added here, and nowhere else."""


def config_types() -> dict[str, type]:
    """Stored name -> config class."""
    return {cls.PEFT_KEY: cls for cls in METHODS}
