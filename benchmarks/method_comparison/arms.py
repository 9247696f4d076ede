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

TARGETS = ["q_proj", "v_proj"]
"""PEFT's default for Llama, and what the suite's LoRA entries train."""
TASK_ROWS = 32
"""Training rows that GuardSpace takes its directions from."""

CALIBRATION_ROWS = 32
"""Of GuardSpace: a quarter of the package's, which was measured to be enough (docs/results.md)."""


@dataclass
class Base:
    """A model without adapters, and what the arms make their configs from.

    Args:
        r: rank of the LoRA that sets the size.
        rows: of the task, as tokens.
        subspace: directory of GuardSpace's subspace; the first arm that needs it makes it.
    """

    model: Any
    tokenizer: Any
    r: int
    rows: Sequence[dict[str, Any]]
    subspace: Path

    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of every target layer."""
        layers = target_layers(self.model, TARGETS)
        return {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}

    @property
    def equal_r(self) -> int:
        """The rank at which a matrix (out, rank) alone has as many parameters as LoRA's two."""
        shapes = self.shapes().values()
        return round(self.r * sum(m + n for m, n in shapes) / sum(m for m, _ in shapes))


@dataclass(frozen=True)
class Arm:
    """A method: its config, its learning rate as a multiple of LoRA's, and whether a random `lora_A` stays frozen."""

    config: Callable[[Base], PeftConfig]
    lr: float = 1.0
    freeze_a: bool = False


def options(r: int) -> dict[str, Any]:
    """Of a LoRA of rank `r`; the scaling is 2, as in the suite."""
    return {"r": r, "lora_alpha": 2 * r, "target_modules": list(TARGETS), "task_type": TaskType.CAUSAL_LM}


def osf(base: Base) -> PeftConfig:
    """The `r` smallest singular triplets of each weight train: as many parameters as LoRA has, and `r` a layer."""
    ends = {name.rpartition(".")[2]: min(shape) - base.r for name, shape in base.shapes().items()}
    return OSFConfig(target_modules=list(TARGETS), rank_pattern=ends, task_type=TaskType.CAUSAL_LM)


def guardspace(base: Base, r: int, train: str) -> PeftConfig:
    """With calibration data of the package and the directions of the task."""
    rows = [Collator(base.tokenizer)(list(base.rows[n : n + 8])) for n in range(0, TASK_ROWS, 8)]
    config = GuardSpaceConfig(**options(r), train=train, task_data=rows, subspace=base.subspace)
    if not base.subspace.exists():
        rows = calibration_rows("guardspace")[:CALIBRATION_ROWS]
        calibrate(base.model, config, rows, tokenizer=base.tokenizer, progress=False).save(base.subspace)
    return config


ARMS = {
    "LoRA": Arm(lambda base: LoraConfig(**options(base.r))),
    "GuardSpace, frozen": Arm(lambda base: guardspace(base, base.equal_r, "B")),
    "GuardSpace, window": Arm(lambda base: guardspace(base, base.r, "window")),
    "OSF": Arm(osf, lr=0.5),
    "MiSS": Arm(lambda base: MissConfig(r=base.equal_r, target_modules=list(TARGETS), task_type=TaskType.CAUSAL_LM)),
    "LoRA-FA": Arm(lambda base: LoraConfig(**options(base.equal_r)), freeze_a=True),
    "DoRA": Arm(lambda base: LoraConfig(**options(base.r), use_dora=True)),
}
"""Learning rates are in the ratios of the suite's own entries: 1e-4, and 5e-5 for OSF. LoRA-FA is the method of its
paper, a random `lora_A` that stays frozen and AdamW; PEFT's optimizer of that name also changes the gradient."""
