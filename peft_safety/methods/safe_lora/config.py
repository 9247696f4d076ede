"""The options of a repair, and SafeLoRAConfig: plain LoRA that knows the pair of models it is to be repaired with."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import torch
from peft import LoraConfig

from peft_safety.core.checks import check_choices, is_number
from peft_safety.core.features import check_features
from peft_safety.core.plain_lora import REPAIRED_TYPE
from peft_safety.errors import ConfigError
from peft_safety.methods.base import option

Select = Literal["threshold", "number", "all"]
Projection = Literal["frobenius", "spectral", "topk", "soft"]
ZeroDelta = Literal["error", "keep", "zero"]
DEFAULT_RANK = 32


@dataclass
class RepairChoices:
    """What decides a repair, and is stored with an adapter.

    Attributes:
        select: "threshold" repairs modules with `cos < threshold`; "number" the `num_modules` with the smallest cos;
            "all".
        projection: "frobenius" (`V V^T / ||V||_F`, as published; it scales with V), "spectral" (`V V^T / sigma_1^2`,
            never longer than the factor), "topk" (onto V's top left singular vectors, a true projector), "soft" (keeps
            that part and damps the rest by `1 / (1 + penalty)`).
        rank, energy: size of the projector of "topk" and "soft": directions (default 32), or a share of `||V||_F^2`.
        penalty: weight of the part outside in "soft"; 0 changes nothing, large values approach "topk". Not tuned.
        zero_delta: where a module's two weights are equal: "error", "keep" its update, or "zero" it.
        allow_quantized_delta: take V from 4-bit or 8-bit weights, whose rounding noise is usually larger than V.
    """

    select: Select = option("threshold", "'threshold', 'number' or 'all'.")
    threshold: float = option(0.35, "Repair modules with a smaller cosine.")
    num_modules: int | None = option(None, "For select='number'.")
    projection: Projection = option("frobenius", "frobenius, spectral, topk or soft.")
    rank: int | None = option(None, "Directions of 'topk' and 'soft'.")
    energy: float | None = option(None, "Or the share of ||V||^2 they hold.")
    penalty: float = option(4.0, "For 'soft'.")
    zero_delta: ZeroDelta = option("error", "'error', 'keep' or 'zero'.")
    allow_quantized_delta: bool = option(False, "Take the difference of quantized weights.")

    def __post_init__(self) -> None:
        check_choices(self, select=Select, projection=Projection, zero_delta=ZeroDelta)
        if self.select == "threshold" and not is_number(self.threshold, 0, 1):
            raise ConfigError(f"threshold={self.threshold!r}. Use a number from 0 to 1.")
        if self.select == "number" and not _is_count(self.num_modules):
            raise ConfigError(f"num_modules={self.num_modules!r}. select='number' needs an integer of at least 1.")
        if self.rank is not None and self.energy is not None:
            raise ConfigError(f"rank={self.rank!r} and energy={self.energy!r}: give one of them.")
        if self.projection not in ("topk", "soft"):
            if self.rank is not None or self.energy is not None:
                raise ConfigError(f"rank and energy belong to projection='topk' or 'soft', not {self.projection!r}.")
        elif self.rank is None and self.energy is None:
            self.rank = DEFAULT_RANK
        if self.rank is not None and not _is_count(self.rank):
            raise ConfigError(f"rank={self.rank!r}. Use an integer of at least 1.")
        if self.energy is not None and not (is_number(self.energy, 0, 1) and self.energy > 0):
            raise ConfigError(f"energy={self.energy!r}. Use a share in (0, 1].")
        if not is_number(self.penalty, low=0):
            raise ConfigError(f"penalty={self.penalty!r}. Use a number of at least 0.")


@dataclass
class RepairOptions(RepairChoices):
    """The choices, and how they are carried out. Cosines are taken in fp64; the device is CUDA if there is one."""

    dtype: torch.dtype = torch.float32
    device: str | torch.device | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype not in (torch.float32, torch.float64):
            raise ConfigError(f"dtype={self.dtype}. Use torch.float32 or torch.float64.")

    def facts(self) -> dict[str, Any]:
        """What decided the result, as plain JSON values."""
        used = {
            "threshold": self.select == "threshold",
            "num_modules": self.select == "number",
            "penalty": self.projection == "soft",
            "allow_quantized_delta": self.allow_quantized_delta,
        }
        names = ["select", "projection", "rank", "energy", *(name for name, use in used.items() if use)]
        return {name: value for name in names if (value := getattr(self, name)) is not None}


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


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1
