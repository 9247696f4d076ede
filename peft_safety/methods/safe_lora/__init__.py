"""Safe LoRA: project a trained adapter onto what alignment changed in its base model."""

from peft_safety.methods.safe_lora.apply import apply_safe_lora, safe_lora_dir
from peft_safety.methods.safe_lora.config import SafeLoRAConfig
from peft_safety.methods.safe_lora.options import RepairOptions
from peft_safety.methods.safe_lora.repair import ModuleRepair, RepairReport

__all__ = ["ModuleRepair", "RepairOptions", "RepairReport", "SafeLoRAConfig", "apply_safe_lora", "safe_lora_dir"]
