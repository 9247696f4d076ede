"""Callbacks for the `Trainer` of transformers and those of TRL."""

from peft_safety.callbacks.adapters import (
    SafeLoRACallback,
    SafetyMonitorCallback,
    SoftPenaltyCallback,
    TaskDirectionsCallback,
    largest_leak,
)
from peft_safety.callbacks.anchor import SafetyAnchorCallback
from peft_safety.callbacks.canary import CanaryCallback

__all__ = [
    "CanaryCallback",
    "SafeLoRACallback",
    "SafetyAnchorCallback",
    "SafetyMonitorCallback",
    "SoftPenaltyCallback",
    "TaskDirectionsCallback",
    "largest_leak",
]
