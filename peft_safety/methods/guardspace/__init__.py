"""GuardSpace: an update that is blind to the inputs which harmful prompts produce."""

from peft_safety.methods.guardspace.config import GuardSpaceConfig
from peft_safety.methods.guardspace.factors import Preconditioner, irrelevant_factors
from peft_safety.methods.guardspace.repair import BlindReport, repair_adapter

__all__ = ["BlindReport", "GuardSpaceConfig", "Preconditioner", "irrelevant_factors", "repair_adapter"]
