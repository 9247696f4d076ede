"""OrthoSafetyPatch: safety patches in directions that the model's own work does not use, stacked or removed freely."""

from peft_safety.methods.ortho_patch.config import OrthoSafetyPatchConfig
from peft_safety.methods.ortho_patch.penalty import SoftPenalty

__all__ = ["OrthoSafetyPatchConfig", "SoftPenalty"]
