"""The adapter types of this package by the name they are stored under."""

from __future__ import annotations

from peft_safety.methods.guardspace import GuardSpaceConfig
from peft_safety.methods.ortho_patch import OrthoSafetyPatchConfig
from peft_safety.methods.safe_lora import SafeLoRAConfig
from peft_safety.methods.salora import SaLoRAConfig


def config_types() -> dict[str, type]:
    """Stored name -> config class. A new method adds one line."""
    return {
        "SALORA": SaLoRAConfig,
        "SAFELORA": SafeLoRAConfig,
        "ORTHOSAFETYPATCH": OrthoSafetyPatchConfig,
        "GUARDSPACE": GuardSpaceConfig,
    }
