"""SaLoRA: keep the output directions that carry safe responses out of the update. `dW = s C B A` with
`C = I - U_C U_C^T`, `U_C` the top left singular vectors of `W X_harm`: so `U_C^T dW = 0` at every step.

Reference: Li et al., ICLR 2025, arXiv 2501.01765, section 4. Differences from its public code (2025-10-23): C acts on
the weight, so that it survives save, merge and quantization; the residual of the task-aware initialization includes
the scaling and leaves the base weight alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from peft_safety.calibration.activations import estimate
from peft_safety.calibration.leaving_out import warn_left_out
from peft_safety.calibration.models import tokenizer_for
from peft_safety.core import base_weights as weights
from peft_safety.core.checks import check_choices
from peft_safety.core.projection import top_singular
from peft_safety.core.subspace import SafetySubspace
from peft_safety.data.rows import data_rows
from peft_safety.errors import ConfigError
from peft_safety.methods.base import ProtectedConfig, option
from peft_safety.methods.factors import start_from

Init = Literal["lora", "task"]


@dataclass
class SaLoRAConfig(ProtectedConfig):
    """`LoraConfig` whose update cannot touch a safety subspace of the layers' outputs.

    Args:
        subspace: `SafetySubspace`, file, directory, Hub id, or `"auto"` (default): calibrate at injection on the
            package's prompts and refusals.
        safety_rank, safety_energy, safety_rank_pattern: size of the subspace of `"auto"`, see `ProtectedConfig`; 32
            output directions per module by default, as published.
        init: `"lora"` starts from B = 0. `"task"` starts from the task-aware factors of the paper, with a residual
            that keeps the function unchanged.
        task_data: for `init="task"`: rows `{prompt, response}`, tokenized batches, or a `SafetySubspace` estimated on
            the task.
        task_rank: directions of the task subspace, 32 as published; fewer, with a warning, where the task's answers
            have fewer (a few labels).

    Raises:
        ConfigError: see `ProtectedConfig`; `init="task"` without `task_data`.

    Reference: SaLoRA, arXiv 2501.01765.
    """

    init: Init = option("lora", "'lora' (B = 0) or 'task' (task-aware, arXiv 2501.01765).")
    task_data: Any = option(None, "Task rows, batches or subspace for init='task'. Not saved.")
    task_rank: int = option(32, "Directions of the task subspace.")

    PEFT_KEY: ClassVar[str] = "SALORA"
    UNSAVED: ClassVar[tuple[str, ...]] = ("task_data",)

    def __post_init__(self) -> None:
        check_choices(self, init=Init)
        if not isinstance(self.task_rank, int) or self.task_rank < 1:
            raise ConfigError(f"SaLoRAConfig: task_rank={self.task_rank!r}. Use an integer of at least 1.")
        if self.task_data is not None and not isinstance(self.task_data, SafetySubspace):
            self.task_data = data_rows(self.task_data, "SaLoRAConfig: task_data")
        super().__post_init__()

    @property
    def residual(self) -> bool:
        return self.init == "task"

    def initialize(self, model: nn.Module, layers: Mapping[str, LoraLayer], adapter_name: str) -> None:
        if self.init == "lora":
            return
        base = {name: layer.get_base_layer() for name, layer in layers.items()}
        if self.task_data is None:
            raise ConfigError("init='task' needs task_data. Give rows, tokenized batches or a SafetySubspace.")
        task = self.task_data
        if not isinstance(task, SafetySubspace):
            rows = data_rows(task, "SaLoRAConfig: task_data")
            tokenizer = tokenizer_for(model, rows)
            task = estimate(model, rows, tokenizer=tokenizer, rank=self.task_rank, layers=base, allow_fewer=True)
        unseen = {name: task.left_out[name] for name in task.lacking(base, ("out",)) if name in task.left_out}
        warn_left_out(unseen, len(base), "the task-aware initialization, and start as plain LoRA's do")
        task.check_fits({name: layer for name, layer in base.items() if name not in unseen}, bind=False)
        for name, layer in layers.items():
            if name in unseen:
                continue
            rank = min(int(layer.r[adapter_name]), *weights.shape(base[name]))
            b, a = task_aware_factors(weights.dense_weight(base[name], name), task.bases[name]["out"], rank)
            start_from(layer, adapter_name, b, a)


@torch.no_grad()
def task_aware_factors(weight: Tensor, task_basis: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`B0 = U_t U_t^T Ubar_r sqrt(S_r) (m, rank)` and `A0 = sqrt(S_r) Vbar_r^T (rank, n)`, from `W ~ Ubar S Vbar^T`.

    Args:
        weight: `W (m, n)`, fp32.
        task_basis: `U_t (m, r_t)`.

    Reference: arXiv 2501.01765, section 4.2.
    """
    u, s, v = top_singular(weight, rank)
    task_basis = task_basis.to(weight.device)
    root = s.sqrt()
    return task_basis @ (task_basis.mT @ (u * root)), (v * root).mT
