"""Safe LoRA: project a trained adapter onto what alignment changed in its base model."""

from peft_safety.methods.safe_lora.apply import apply_safe_lora, safe_lora_dir
from peft_safety.methods.safe_lora.config import RepairOptions, SafeLoRAConfig
from peft_safety.methods.safe_lora.repair import ModuleRepair, RepairReport

__all__ = ["ModuleRepair", "RepairOptions", "RepairReport", "SafeLoRAConfig", "apply_safe_lora", "safe_lora_dir"]
