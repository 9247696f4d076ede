"""The methods that are compared, at the size of a LoRA on q_proj and v_proj, as in PEFT's own comparison."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, MissConfig, OSFConfig, PeftConfig, TaskType

from peft_safety import GuardSpaceConfig, calibrate
from peft_safety.core.targets import target_layers
from peft_safety.data import calibration_rows
from peft_safety.data.chat import Collator

COMMON: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "task_type": TaskType.CAUSAL_LM}
"""PEFT's default targets for Llama, and those of the suite's LoRA entries."""
TASK_ROWS = CALIBRATION_ROWS = 32
"""What GuardSpace sees of the task, and of the package's prompts: a quarter, measured to be enough (docs/results)."""


@dataclass
class Base:
    """A model without adapters, and what configs are made from: the rank of the LoRA that sets the size, tokenized
    rows of the task, and the directory of GuardSpace's subspace, which the first arm that needs it makes.
    """

    model: Any
    tokenizer: Any
    r: int
    rows: Sequence[dict[str, Any]]
    subspace: Path

    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of every target layer."""
        layers = target_layers(self.model, COMMON["target_modules"])
        return {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}

    @property
    def equal_r(self) -> int:
        """The rank at which matrices (out, rank) alone have as many parameters as LoRA's pairs."""
        shapes = self.shapes().values()
        return round(self.r * sum(m + n for m, n in shapes) / sum(m for m, _ in shapes))


@dataclass(frozen=True)
class Arm:
    """A method: its config, its learning rate as a multiple of LoRA's, and whether a random `lora_A` stays frozen."""

    config: Callable[[Base], PeftConfig]
    lr: float = 1.0
    freeze_a: bool = False


def lora(r: int, kind: type[LoraConfig] = LoraConfig, **options: Any) -> LoraConfig:
    return kind(r=r, lora_alpha=2 * r, **COMMON, **options)


def osf(base: Base) -> PeftConfig:
    """The `r` smallest singular triplets of each weight train: as many parameters as LoRA has."""
    kept = {name.rpartition(".")[2]: min(shape) - base.r for name, shape in base.shapes().items()}
    return OSFConfig(rank_pattern=kept, **COMMON)


def guardspace(base: Base, r: int, train: str) -> PeftConfig:
    """With the directions of the task."""
    rows = [Collator(base.tokenizer)(list(base.rows[n : n + 8])) for n in range(0, TASK_ROWS, 8)]
    config = lora(r, GuardSpaceConfig, train=train, task_data=rows, subspace=base.subspace)
    if not base.subspace.exists():
        safety = calibration_rows("guardspace")[:CALIBRATION_ROWS]
        calibrate(base.model, config, safety, tokenizer=base.tokenizer, progress=False).save(base.subspace)
    return config


ARMS = {
    "LoRA": Arm(lambda base: lora(base.r)),
    "GuardSpace, frozen": Arm(lambda base: guardspace(base, base.equal_r, "B")),
    "GuardSpace, window": Arm(lambda base: guardspace(base, base.r, "window")),
    "OSF": Arm(osf, lr=0.5),
    "MiSS": Arm(lambda base: MissConfig(r=base.equal_r, **COMMON)),
    "LoRA-FA": Arm(lambda base: lora(base.equal_r), freeze_a=True),
    "DoRA": Arm(lambda base: lora(base.r, use_dora=True)),
}
"""Learning rates are in the ratios of the suite's own entries: 1e-4, and 5e-5 for OSF. LoRA-FA is the method of its
paper, a random `lora_A` that stays frozen and AdamW; PEFT's optimizer of that name also changes the gradient."""
