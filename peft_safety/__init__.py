"""peft_safety: LoRA fine-tuning that keeps a model's safety alignment. A plugin for Hugging Face PEFT.

Importing this package makes PEFT know its config types. It stays light itself: PEFT and torch are loaded when they are
needed, and the types are registered at the moment PEFT is imported, by whoever.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from peft_safety.importing import WhenPeftIsImported

if TYPE_CHECKING:
    from peft_safety.audit import orthogonality_report
    from peft_safety.callbacks import (
        SafeLoRACallback,
        SafetyMonitorCallback,
        SoftPenaltyCallback,
        TaskDirectionsCallback,
    )
    from peft_safety.convert.export import export_lora
    from peft_safety.convert.merge import merge_quantized
    from peft_safety.convert.verify import verify
    from peft_safety.core.subspace import SafetySubspace
    from peft_safety.errors import PeftSafetyError
    from peft_safety.methods.base import calibrate
    from peft_safety.methods.guardspace import GuardSpaceConfig, repair_adapter
    from peft_safety.methods.ortho_patch import OrthoSafetyPatchConfig
    from peft_safety.methods.safe_lora import SafeLoRAConfig, apply_safe_lora, safe_lora_dir
    from peft_safety.methods.salora import SaLoRAConfig
    from peft_safety.methods.somf import fuse
    from peft_safety.recipes.calibrate import calibration_cost
    from peft_safety.registry.fused import explain
    from peft_safety.registry.protection import assert_protected

__version__ = "0.1.0"

_NAMES = {
    "PeftSafetyError": "errors",
    "GuardSpaceConfig": "methods.guardspace",
    "OrthoSafetyPatchConfig": "methods.ortho_patch",
    "SaLoRAConfig": "methods.salora",
    "SafeLoRACallback": "callbacks",
    "SafeLoRAConfig": "methods.safe_lora",
    "SafetyMonitorCallback": "callbacks",
    "SoftPenaltyCallback": "callbacks",
    "SafetySubspace": "core.subspace",
    "TaskDirectionsCallback": "callbacks",
    "apply_safe_lora": "methods.safe_lora",
    "assert_protected": "registry.protection",
    "calibrate": "methods.base",
    "calibration_cost": "recipes.calibrate",
    "explain": "registry.fused",
    "export_lora": "convert.export",
    "fuse": "methods.somf",
    "merge_quantized": "convert.merge",
    "orthogonality_report": "audit",
    "repair_adapter": "methods.guardspace",
    "safe_lora_dir": "methods.safe_lora",
    "verify": "convert.verify",
}
__all__ = [
    "GuardSpaceConfig",
    "OrthoSafetyPatchConfig",
    "PeftSafetyError",
    "SaLoRAConfig",
    "SafeLoRACallback",
    "SafeLoRAConfig",
    "SafetyMonitorCallback",
    "SafetySubspace",
    "SoftPenaltyCallback",
    "TaskDirectionsCallback",
    "apply_safe_lora",
    "assert_protected",
    "calibrate",
    "calibration_cost",
    "explain",
    "export_lora",
    "fuse",
    "merge_quantized",
    "orthogonality_report",
    "repair_adapter",
    "safe_lora_dir",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'peft_safety' has no attribute {name!r}")
    return getattr(importlib.import_module(f"peft_safety.{_NAMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES})


if "peft" in sys.modules:
    importlib.import_module("peft_safety.registry.registration").register()
else:
    sys.meta_path.insert(0, WhenPeftIsImported())
