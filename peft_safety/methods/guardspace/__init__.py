"""GuardSpace: an update that is blind to the inputs which harmful prompts produce."""

from peft_safety.methods.guardspace.config import GuardSpaceConfig
from peft_safety.methods.guardspace.factors import Preconditioner, irrelevant_factors

__all__ = ["GuardSpaceConfig", "Preconditioner", "irrelevant_factors"]
