"""The options of a fusion, and of the training of its mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from peft_safety.core.checks import check_choices, check_positive, is_number
from peft_safety.core.training import TrainOptions
from peft_safety.errors import ConfigError
from peft_safety.methods.somf.masks import Export, Granularity, Rescale

Method = Literal["somf", "task_arithmetic"]
Layout = Literal["auto", "continued", "independent"]
Objective = Literal["dpo", "sft"]

WEIGHT = 0.3
"""Published weight of each of several task vectors: SOMF, arXiv 2405.09055. A single one has weight 1."""


@dataclass(frozen=True)
class FuseOptions:
    """Options of `fuse`.

    Attributes:
        method: "somf" learns a mask (or takes `mask`); "task_arithmetic" is the same without a mask.
        weights: of the task vectors, one number or one per task; default 1 for one task and 0.3 for several.
        granularity: one logit per "element" (default), "row", "rank" component (for independent adapters) or "module".
        rescale: see `masks.rescaled`. "module" needs "none": the mean cancels a mask of one value.
        temperature: of the concrete samples.
        export, export_density, seed: see `masks.export`; the seed also decides the noise of the training.
        layout: "continued" where the training of the task adapters started from the safe one, so that A and B have
            task vectors; else "independent". "auto" looks at the factors.
        ignore_base_names: accept adapters that name different base models, if you know that these are the same.
    """

    method: Method = "somf"
    weights: float | Sequence[float] | None = None
    granularity: Granularity | None = None
    rescale: Rescale = "mean"
    temperature: float = 0.5
    export: Export = "threshold"
    export_density: float | None = None
    seed: int = 0
    layout: Layout = "auto"
    ignore_base_names: bool = False

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise ConfigError(
                f"method={self.method!r}. Use 'somf' (a learned mask) or 'task_arithmetic' (no mask). For TIES, DARE "
                "and others use PEFT's model.add_weighted_adapter(...), and mergekit on full checkpoints."
            )
        check_choices(self, rescale=Rescale, export=Export, layout=Layout)
        if self.granularity is not None:
            check_choices(self, granularity=Granularity)
        if self.granularity == "module" and self.rescale != "none":
            raise ConfigError("granularity='module' needs rescale='none': the mean cancels a mask of one value.")
        density = self.export_density
        if (self.export == "topk") != (density is not None):
            raise ConfigError(f"export={self.export!r}, export_density={density!r}. Give a density with 'topk' only.")
        if density is not None and not (is_number(density) and 0 < density < 1):
            raise ConfigError(f"export_density={density!r}. Use a number strictly between 0 and 1.")
        check_positive(self, "temperature")
        if type(self.seed) is not int or self.seed < 0:
            raise ConfigError(f"seed={self.seed!r}. Use an integer of at least 0.")
        if self.weights is not None and not isinstance(self.weights, (int, float)):
            object.__setattr__(self, "weights", tuple(self.weights))
        weights = self.weights if isinstance(self.weights, tuple) else (self.weights,)
        if self.weights is not None and not all(map(is_number, weights)):
            raise ConfigError(f"weights={self.weights!r}. Use finite numbers.")

    def weights_of(self, tasks: int) -> list[float]:
        weights = (1.0 if tasks == 1 else WEIGHT) if self.weights is None else self.weights
        if isinstance(weights, (int, float)):
            return [float(weights)] * tasks
        if len(weights) != tasks:
            raise ConfigError(f"{len(weights)} weights for {tasks} tasks. Give one number, or one per task.")
        return [float(weight) for weight in weights]


@dataclass(frozen=True)
class MaskTraining(TrainOptions):
    """How a mask is trained. Only its logits are; the published `lr` is 1e-3 to 1e-2, and masks with few entries bear
    ten times as much.

    Attributes:
        objective: "dpo" on {prompt, chosen, rejected} rows; "sft" on {prompt, response} rows, which costs half.
        beta: of DPO, whose reference is the safe model without any task.
        gradient_accumulation, bf16: as in `transformers.TrainingArguments`; the mask itself stays in fp32.
        save_steps, checkpoint_dir, resume: write a checkpoint (logits and optimizer state) every so many steps; go on
            from the last one.
    """

    lr: float = 1e-2
    epochs: float = 3.0
    batch_size: int = 16
    objective: Objective = "dpo"
    beta: float = 0.1
    gradient_accumulation: int = 1
    bf16: bool = False
    save_steps: int | None = None
    checkpoint_dir: str | Path | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, objective=Objective)
        check_positive(self, "beta", "gradient_accumulation")
        if (self.save_steps is not None or self.resume) and self.checkpoint_dir is None:
            raise ConfigError("save_steps and resume need a checkpoint_dir. Give a directory.")
