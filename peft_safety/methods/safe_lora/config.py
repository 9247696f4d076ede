"""SafeLoRAConfig: plain LoRA that knows the pair of models it is to be repaired with."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from peft import LoraConfig

from peft_safety.core.plain_lora import REPAIRED_TYPE, check_features
from peft_safety.errors import ConfigError
from peft_safety.methods.base import option
from peft_safety.methods.safe_lora.options import RepairChoices

OPTIONS = tuple(f.name for f in fields(RepairChoices))


@dataclass
class SafeLoRAConfig(RepairChoices, LoraConfig):
    """`LoraConfig` for training as usual, and for `SafeLoRACallback` to repair at the end. Stored as "SAFELORA".

    Args:
        unaligned: directory or Hub id of the model before its alignment, 16-bit.
        aligned: of the model after it, 16-bit; default the base model, which must then not be quantized.
        select, threshold, num_modules, projection, rank, energy, penalty, zero_delta, allow_quantized_delta: see
            `RepairChoices`.
        safe_lora: record of the repair; None until it was applied. Leave it alone.

    Raises:
        ConfigError: no pair, options out of range, or a LoRA feature whose update is not a plain `B A`.

    Reference: Hsu et al., Safe LoRA, NeurIPS 2024, arXiv 2405.16833.
    """

    unaligned: str | None = option(None, "The model before alignment: directory or Hub id.")
    aligned: str | None = option(None, "The model after it; default: the base model.")
    safe_lora: dict[str, Any] | None = option(None, "Record of the repair; written by it.")

    PEFT_KEY: ClassVar[str] = REPAIRED_TYPE

    def __post_init__(self) -> None:
        for name in ("unaligned", "aligned"):
            value = getattr(self, name)
            setattr(self, name, os.fspath(value) if isinstance(value, os.PathLike) else value)
        if not (isinstance(self.unaligned, str) and self.unaligned and isinstance(self.aligned, (str, type(None)))):
            given = f"unaligned={self.unaligned!r}, aligned={self.aligned!r}"
            raise ConfigError(f"SafeLoRAConfig: {given}. Give unaligned= (and aligned=) as directories or Hub ids.")
        RepairChoices.__post_init__(self)
        LoraConfig.__post_init__(self)
        check_features(self, "SafeLoRAConfig")

    def repair_options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in OPTIONS}

    def to_dict(self) -> dict[str, Any]:
        """Under the method's own name: PEFT alone refuses an adapter that may not have been repaired yet."""
        result: dict[str, Any] = super().to_dict()
        return result | {"peft_type": self.PEFT_KEY}
