"""Which adapter an arm trains: plain LoRA, or SaLoRA with its subspaces estimated on the model at hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from peft_safety.data import CALIBRATION_PAIRS, refusal_pairs
from peft_safety.data.chat import Row
from peft_safety.errors import ConfigError

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from peft_safety.subspace import SafetySubspace

Method = Literal["lora", "salora"]


@dataclass(frozen=True)
class AdapterOptions:
    """An arm's adapter.

    Attributes:
        method: "lora" (not protected) or "salora".
        r, lora_alpha, target_modules: as in `LoraConfig`.
        safety_rank, subspace, init, task_rank: as in `SaLoRAConfig`; not used by "lora".
    """

    method: Method = "salora"
    r: int = 16
    lora_alpha: int = 16
    target_modules: str | list[str] = "all-linear"
    safety_rank: int = 32
    subspace: SafetySubspace | str = "auto"
    init: Literal["lora", "task"] = "lora"
    task_rank: int = 32

    def __post_init__(self) -> None:
        if self.method not in ("lora", "salora"):
            raise ConfigError(f"method {self.method!r} is unknown. Choose 'lora' or 'salora'.")

    def config(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], *, seed: int = 0, progress: bool = True) -> LoraConfig:
        """The PEFT config. A subspace is estimated here rather than at injection, so that `model` and `tokenizer` are the ones at hand.

        Args:
            rows: training rows; the first 128 give the task subspace of `init="task"`.

        Raises:
            ConfigError: settings that the config refuses. CalibrationError: see `SafetySubspace.from_activations`.
        """
        from peft import LoraConfig, TaskType

        common: dict[str, Any] = {"r": self.r, "lora_alpha": self.lora_alpha, "target_modules": self.target_modules, "task_type": TaskType.CAUSAL_LM}
        if self.method == "lora":
            return LoraConfig(**common)
        from peft_safety.methods.salora import SaLoRAConfig
        from peft_safety.subspace import SafetySubspace

        def estimate(data: Sequence[Row], rank: int) -> SafetySubspace:
            targets = self.target_modules
            return SafetySubspace.from_activations(
                model, data, tokenizer=tokenizer, rank=rank, target_modules=targets, seed=seed, allow_fewer=True, progress=progress
            )

        calibrate = isinstance(self.subspace, str) and self.subspace == "auto"
        subspace = estimate(refusal_pairs("calibration", CALIBRATION_PAIRS, seed), self.safety_rank) if calibrate else self.subspace
        task = estimate(rows[:CALIBRATION_PAIRS], self.task_rank) if self.init == "task" else None
        return SaLoRAConfig(**common, subspace=subspace, safety_rank=self.safety_rank, init=self.init, task_data=task, task_rank=self.task_rank)
