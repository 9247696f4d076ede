"""Which adapter an arm trains: plain LoRA, or SaLoRA or GuardSpace with their subspaces estimated on the model at hand."""

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

Method = Literal["lora", "salora", "guardspace"]
INITS = {"lora": ("lora",), "salora": ("lora", "task"), "guardspace": ("lora", "guardspace")}
"""Initialisations of each method."""
GUARD_ROWS = 32
"""Training rows that GuardSpace's guard against stalling looks at: thousands of tokens, plenty for a share of energy."""


@dataclass(frozen=True)
class AdapterOptions:
    """An arm's adapter.

    Attributes:
        method: "lora" (not protected), "salora" or "guardspace".
        r, lora_alpha, target_modules: as in `LoraConfig`.
        safety_rank, subspace, init, task_rank: as in `SaLoRAConfig`, and the first three in `GuardSpaceConfig`; not used by "lora".
        basis, fraction, positions, combine: as in `GuardSpaceConfig`; for "guardspace" only.
    """

    method: Method = "salora"
    r: int = 16
    lora_alpha: int = 16
    target_modules: str | list[str] = "all-linear"
    safety_rank: int = 32
    subspace: SafetySubspace | str = "auto"
    init: Literal["lora", "task", "guardspace"] = "lora"
    task_rank: int = 32
    basis: Literal["harmful", "general", "both"] | None = None
    fraction: float | None = None
    positions: Literal["all", "prompt", "response"] = "all"
    combine: Literal["salora"] | None = None

    def __post_init__(self) -> None:
        if self.method not in INITS:
            raise ConfigError(f"method {self.method!r} is unknown. Choose 'lora', 'salora' or 'guardspace'.")
        if self.init not in INITS[self.method]:
            raise ConfigError(f"init {self.init!r} is not one of {self.method}'s: {', '.join(INITS[self.method])}.")
        if self.method != "guardspace" and (self.basis or self.fraction is not None or self.combine or self.positions != "all"):
            raise ConfigError(f"basis, fraction, positions and combine are GuardSpace's, not {self.method}'s. Leave them out, or use method 'guardspace'.")

    def config(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], *, seed: int = 0, progress: bool = True) -> LoraConfig:
        """The PEFT config. A subspace is estimated here rather than at injection, so that `model` and `tokenizer` are the ones at hand.

        Args:
            rows: training rows; the first 128 give the task subspace of `init="task"`, the first 32 GuardSpace's guard against stalling.

        Raises:
            ConfigError: settings that the config refuses. CalibrationError: see `SafetySubspace.from_activations`.
        """
        from peft import LoraConfig, TaskType

        common: dict[str, Any] = {"r": self.r, "lora_alpha": self.lora_alpha, "target_modules": self.target_modules, "task_type": TaskType.CAUSAL_LM}
        if self.method == "lora":
            return LoraConfig(**common)
        if self.method == "guardspace":
            return self._guardspace(model, tokenizer, rows, common, seed, progress)
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
        init: Any = self.init
        return SaLoRAConfig(**common, subspace=subspace, safety_rank=self.safety_rank, init=init, task_data=task, task_rank=self.task_rank)

    def _guardspace(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], common: dict[str, Any], seed: int, progress: bool
    ) -> LoraConfig:
        from peft_safety.data import calibration_rows
        from peft_safety.estimate.moments import to_batches
        from peft_safety.estimate.targets import target_layers
        from peft_safety.methods.guardspace import GuardSpaceConfig
        from peft_safety.methods.guardspace.config import DEFAULT_BASIS

        def batches(data: Sequence[Row]) -> Any:
            return to_batches(data, tokenizer, batch_size=8, max_length=512)[0]

        basis = self.basis or DEFAULT_BASIS
        init: Any = self.init
        config = GuardSpaceConfig(
            **common,
            subspace=self.subspace,
            safety_rank=self.safety_rank,
            basis=basis,
            fraction=self.fraction,
            positions=self.positions,
            combine=self.combine,
            init=init,
            init_data=batches(calibration_rows("guardspace", basis)) if init == "guardspace" else None,
            task_data=batches(rows[:GUARD_ROWS]),
        )
        if isinstance(self.subspace, str) and self.subspace == "auto":
            layers = target_layers(model, self.target_modules)
            config.subspace = config.calibrate(model, layers, tokenizer=tokenizer, seed=seed, progress=progress)
        return config
