"""Callbacks for the `Trainer` of transformers and those of TRL."""

from peft_safety.callbacks.adapters import SafeLoRACallback as SafeLoRACallback
from peft_safety.callbacks.adapters import SafetyMonitorCallback as SafetyMonitorCallback
from peft_safety.callbacks.adapters import SoftPenaltyCallback as SoftPenaltyCallback
from peft_safety.callbacks.adapters import TaskDirectionsCallback as TaskDirectionsCallback
from peft_safety.callbacks.adapters import largest_leak as largest_leak
from peft_safety.callbacks.anchor import SafetyAnchorCallback as SafetyAnchorCallback
from peft_safety.callbacks.canary import CanaryCallback as CanaryCallback
