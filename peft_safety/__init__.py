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
    from peft_safety.audit import orthogonality_report as orthogonality_report
    from peft_safety.calibration.estimators import SafetySubspace as SafetySubspace
    from peft_safety.callbacks import CanaryCallback as CanaryCallback
    from peft_safety.callbacks import SafeLoRACallback as SafeLoRACallback
    from peft_safety.callbacks import SafetyAnchorCallback as SafetyAnchorCallback
    from peft_safety.callbacks import SafetyMonitorCallback as SafetyMonitorCallback
    from peft_safety.callbacks import SoftPenaltyCallback as SoftPenaltyCallback
    from peft_safety.callbacks import TaskDirectionsCallback as TaskDirectionsCallback
    from peft_safety.convert.export import export_lora as export_lora
    from peft_safety.convert.merge import merge_quantized as merge_quantized
    from peft_safety.convert.verify import verify as verify
    from peft_safety.data.chat import Collator as Collator
    from peft_safety.data.chat import encode_rows as encode_rows
    from peft_safety.errors import PeftSafetyError as PeftSafetyError
    from peft_safety.methods.base import calibrate as calibrate
    from peft_safety.methods.guardspace import GuardSpaceConfig as GuardSpaceConfig
    from peft_safety.methods.guardspace import repair_adapter as repair_adapter
    from peft_safety.methods.ortho_patch import OrthoSafetyPatchConfig as OrthoSafetyPatchConfig
    from peft_safety.methods.safe_lora import SafeLoRAConfig as SafeLoRAConfig
    from peft_safety.methods.safe_lora import apply_safe_lora as apply_safe_lora
    from peft_safety.methods.safe_lora import safe_lora_dir as safe_lora_dir
    from peft_safety.methods.salora import SaLoRAConfig as SaLoRAConfig
    from peft_safety.methods.somf import fuse as fuse
    from peft_safety.recipes.calibrate import calibration_cost as calibration_cost
    from peft_safety.recipes.screen import screen as screen
    from peft_safety.registry.fused import explain_dispatch as explain_dispatch
    from peft_safety.registry.protection import assert_protected as assert_protected

__version__ = "0.1.0"

_NAMES = {
    "audit": ["orthogonality_report"],
    "calibration.estimators": ["SafetySubspace"],
    "callbacks": [
        "CanaryCallback",
        "SafeLoRACallback",
        "SafetyAnchorCallback",
        "SafetyMonitorCallback",
        "SoftPenaltyCallback",
        "TaskDirectionsCallback",
    ],
    "convert.export": ["export_lora"],
    "convert.merge": ["merge_quantized"],
    "convert.verify": ["verify"],
    "data.chat": ["Collator", "encode_rows"],
    "errors": ["PeftSafetyError"],
    "methods.base": ["calibrate"],
    "methods.guardspace": ["GuardSpaceConfig", "repair_adapter"],
    "methods.ortho_patch": ["OrthoSafetyPatchConfig"],
    "methods.safe_lora": ["SafeLoRAConfig", "apply_safe_lora", "safe_lora_dir"],
    "methods.salora": ["SaLoRAConfig"],
    "methods.somf": ["fuse"],
    "recipes.calibrate": ["calibration_cost"],
    "recipes.screen": ["screen"],
    "registry.fused": ["explain_dispatch"],
    "registry.protection": ["assert_protected"],
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'peft_safety' has no attribute {name!r}")
    return getattr(importlib.import_module(f"peft_safety.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})


if "peft" in sys.modules:
    importlib.import_module("peft_safety.registry.registration").register()
else:
    sys.meta_path.insert(0, WhenPeftIsImported())
