"""Which adapter an arm trains: plain LoRA, or SaLoRA or GuardSpace with their subspaces estimated on the model at
hand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from peft_safety.calibration.activations import DEFAULT_RANK, GUARDSPACE_FRACTION
from peft_safety.calibration.size_options import check_size_options
from peft_safety.data import CALIBRATION_PAIRS, refusal_pairs
from peft_safety.data.rows import Row, Rows, as_rows
from peft_safety.errors import ConfigError

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from peft_safety.core.subspace import SafetySubspace

Method = Literal["lora", "salora", "guardspace"]
INITS = {"lora": ("lora",), "salora": ("lora", "task"), "guardspace": ("lora", "guardspace")}
"""Initializations of each method."""
GUARD_ROWS = 32
"""Training rows that GuardSpace's guard against stalling looks at: thousands of tokens, plenty for a share of
energy.
"""


@dataclass(frozen=True)
class AdapterOptions:
    """An arm's adapter.

    Attributes:
        method: "lora" (not protected), "salora" or "guardspace".
        r, lora_alpha, target_modules: as in `LoraConfig`.
        safety_rank, safety_energy, safety_rank_pattern: as in the configs: size of the subspace of "auto"; by default
            32 directions per module for "salora" and a quarter of its features for "guardspace".
        subspace, init, task_rank: as in `SaLoRAConfig`, and the first two in `GuardSpaceConfig`; not used by "lora".
        basis, positions, combine, combine_rank: as in `GuardSpaceConfig`; for "guardspace" only.
    """

    method: Method = "guardspace"
    r: int = 16
    lora_alpha: int = 16
    target_modules: str | list[str] = "all-linear"
    safety_rank: int | float | None = None
    safety_energy: float | None = None
    safety_rank_pattern: Mapping[str, int | float] | None = None
    subspace: SafetySubspace | str = "auto"
    init: Literal["lora", "task", "guardspace"] = "lora"
    task_rank: int = 32
    basis: Literal["harmful", "general", "both"] | None = None
    positions: Literal["all", "prompt", "response"] = "all"
    combine: Literal["salora"] | None = None
    combine_rank: int = DEFAULT_RANK

    def __post_init__(self) -> None:
        if self.method not in INITS:
            raise ConfigError(f"method {self.method!r} is unknown. Choose 'lora', 'salora' or 'guardspace'.")
        if self.init not in INITS[self.method]:
            raise ConfigError(f"init {self.init!r} is not one of {self.method}'s: {', '.join(INITS[self.method])}.")
        if self.method != "guardspace" and (self.basis or self.combine or self.positions != "all"):
            raise ConfigError(
                f"basis, positions and combine are GuardSpace's, not {self.method}'s. Leave them out, or use method "
                "'guardspace'."
            )
        sizes = {
            "safety_rank": self.safety_rank,
            "safety_energy": self.safety_energy,
            "safety_rank_pattern": self.safety_rank_pattern or None,
        }
        given = [name for name, value in sizes.items() if value is not None]
        if given and self.method == "lora":
            raise ConfigError(
                f"{given[0]} is the size of a protected subspace, and method 'lora' has none. Leave it out, or use "
                "method 'guardspace'."
            )
        check_size_options(self.safety_rank, self.safety_energy, self.safety_rank_pattern, type(self).__name__)

    @property
    def size(self) -> int | float | None:
        """The rank in force: the default if nothing is given, None if `safety_energy` is."""
        usual = {"salora": DEFAULT_RANK, "guardspace": GUARDSPACE_FRACTION}.get(self.method)
        return self.safety_rank if self.safety_rank is not None or self.safety_energy is not None else usual

    def config(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: Rows,
        *,
        seed: int = 0,
        progress: bool = True,
    ) -> LoraConfig:
        """The PEFT config. A subspace is estimated here rather than at injection, so that `model` and `tokenizer` are
        the ones at hand.

        Args:
            rows: training rows; the first 128 give the task subspace of `init="task"`, the first 32 GuardSpace's guard
                against stalling.

        Raises:
            ConfigError: settings that the config refuses. CalibrationError: see `SafetySubspace.from_activations`.
        """
        from peft import LoraConfig, TaskType

        rows = as_rows(rows)
        common: dict[str, Any] = {
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "target_modules": self.target_modules,
            "task_type": TaskType.CAUSAL_LM,
        }
        if self.method == "lora":
            return LoraConfig(**common)
        common |= {
            "safety_rank": self.safety_rank,
            "safety_energy": self.safety_energy,
            "safety_rank_pattern": None if self.safety_rank_pattern is None else dict(self.safety_rank_pattern),
        }
        if self.method == "guardspace":
            return self._guardspace(model, tokenizer, rows, common, seed, progress)
        from peft_safety.core.subspace import SafetySubspace
        from peft_safety.methods.salora import SaLoRAConfig

        def estimate(data: Rows, **size: Any) -> SafetySubspace:
            targets = self.target_modules
            return SafetySubspace.from_activations(
                model,
                data,
                tokenizer=tokenizer,
                **size,
                target_modules=targets,
                seed=seed,
                allow_fewer=True,
                progress=progress,
            )

        calibrate = isinstance(self.subspace, str) and self.subspace == "auto"
        size: dict[str, Any] = {"rank": self.size, "energy": self.safety_energy, "per_kind": self.safety_rank_pattern}
        subspace = (
            estimate(refusal_pairs("calibration", CALIBRATION_PAIRS, seed), **size) if calibrate else self.subspace
        )
        task = estimate(rows[:CALIBRATION_PAIRS], rank=self.task_rank) if self.init == "task" else None
        init: Any = self.init
        return SaLoRAConfig(**common, subspace=subspace, init=init, task_data=task, task_rank=self.task_rank)

    def _guardspace(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[Row],
        common: dict[str, Any],
        seed: int,
        progress: bool,
    ) -> LoraConfig:
        from peft_safety.calibration.moments import to_batches
        from peft_safety.core.targets import target_layers
        from peft_safety.data import calibration_rows
        from peft_safety.methods.guardspace import GuardSpaceConfig
        from peft_safety.methods.guardspace.config import DEFAULT_BASIS

        def batches(data: Sequence[Row]) -> Any:
            return to_batches(data, tokenizer, batch_size=8, max_length=512)[0]

        basis = self.basis or DEFAULT_BASIS
        init: Any = self.init
        config = GuardSpaceConfig(
            **common,
            subspace=self.subspace,
            basis=basis,
            positions=self.positions,
            combine=self.combine,
            combine_rank=self.combine_rank,
            init=init,
            init_data=batches(calibration_rows("guardspace", basis)) if init == "guardspace" else None,
            task_data=batches(rows[:GUARD_ROWS]),
        )
        if isinstance(self.subspace, str) and self.subspace == "auto":
            layers = target_layers(model, self.target_modules)
            config.subspace = config.calibrate(model, layers, tokenizer=tokenizer, seed=seed, progress=progress)
        return config
