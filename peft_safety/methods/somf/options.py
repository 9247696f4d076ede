"""What can be asked of a fusion, and of the training of its mask."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from peft_safety.errors import ConfigError
from peft_safety.methods.somf.fusions import Fusion, Merge
from peft_safety.methods.somf.masks import Export, Granularity, Rescale

Method = Literal["somf", "single", "task_arithmetic", "dare", "ties", "average"]
Layout = Literal["auto", "continued", "independent"]
Objective = Literal["dpo", "sft"]
Reference = Literal["aligned", "base"]

WEIGHTS: dict[str, float] = {"single": 1.0, "task_arithmetic": 0.3, "dare": 0.3, "ties": 0.4}
"""Published scalings of the summed task vectors: SOMF, arXiv 2405.09055, and its reference code."""
MAX_SHARD_BYTES = 4 << 30


@dataclass(frozen=True)
class FuseOptions:
    """Options of `fuse`.

    Attributes:
        method: "somf" learns a mask (or takes `mask`) and applies `fusion` under it; the others are that fusion
            without a mask.
        fusion: for "somf"; default task_arithmetic, or single where there is one task.
        weights: of the task vectors, one number or one a task; default as published (0.3; ties 0.4; single 1).
            "average" has none.
        drop: share of entries that "dare" drops.
        ties_density, ties_merge: share of entries that "ties" keeps; "sum" of what agrees (SOMF) or "mean" (TIES,
            PEFT); trimmed within each tensor.
        granularity: one logit an "element", "row", "rank" component or "module"; default element, and rank for
            independent adapters.
        rescale: see `masks.rescaled`. "module" needs "none": the other two cancel a mask of one value.
        temperature: of the concrete samples.
        initial_density: probability with which everything is kept at first.
        target_density, density_penalty: adds `penalty * (density - target)^2` to the loss. None leaves the density
            alone, as published.
        export, export_density, seed: see `masks.export`; the seed also decides DARE's drops and the noise.
        layout: "continued" where the task adapters were trained on from the safe one, so that A and B have task
            vectors; "independent" where they were not. "auto" looks at the factors.
        rank: recompress the result to this rank, and report the relative error. Full checkpoints become a LoRA on the
            safe one. Needed for dare and ties of independent adapters, whose result is dense.
        ignore_base_names: adapters name different base models, and you know that they are the same one.
        max_shard_bytes: of written checkpoints.
        progress: show a bar.

    Raises:
        ConfigError: a value that is out of range, or a combination that means nothing.
    """

    method: Method = "somf"
    fusion: Fusion | None = None
    weights: float | Sequence[float] | None = None
    drop: float = 0.2
    ties_density: float = 0.2
    ties_merge: Merge = "sum"
    granularity: Granularity | None = None
    rescale: Rescale = "mean"
    temperature: float = 0.5
    initial_density: float = 0.5
    target_density: float | None = None
    density_penalty: float = 1.0
    export: Export = "threshold"
    export_density: float | None = None
    seed: int = 0
    layout: Layout = "auto"
    rank: int | None = None
    ignore_base_names: bool = False
    max_shard_bytes: int = MAX_SHARD_BYTES
    progress: bool = True

    def __post_init__(self) -> None:
        for name, values in _CHOICES.items():
            if getattr(self, name) not in values:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r}. Use one of {', '.join(str(v) for v in values if v is not None)}."
                )
        for name in ("drop", "ties_density", "initial_density", "target_density", "export_density"):
            value = getattr(self, name)
            if value is not None and not (_number(value) and 0 < value < 1):
                raise ConfigError(f"{name}={value!r}. Use a number strictly between 0 and 1.")
        for name in ("temperature", "density_penalty"):
            if not (_number(getattr(self, name)) and getattr(self, name) > 0):
                raise ConfigError(f"{name}={getattr(self, name)!r}. Use a positive number.")
        for name in ("rank", "seed", "max_shard_bytes"):
            value = getattr(self, name)
            if value is not None and (
                not isinstance(value, int) or isinstance(value, bool) or value < (0 if name == "seed" else 1)
            ):
                raise ConfigError(f"{name}={value!r}. Use an integer of at least {0 if name == 'seed' else 1}.")
        if not isinstance(self.weights, (int, float, type(None))):
            object.__setattr__(self, "weights", tuple(self.weights))
        if not all(_number(w) for w in (self.weights if isinstance(self.weights, tuple) else (self.weights or 0.0,))):
            raise ConfigError(f"weights={self.weights!r}. Use finite numbers.")
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.fusion is not None and self.method != "somf":
            raise ConfigError(
                f"fusion={self.fusion!r} belongs to method='somf', not to {self.method!r}. Leave it out."
            )
        if (self.export == "topk") != (self.export_density is not None):
            raise ConfigError(
                f"export={self.export!r} with export_density={self.export_density!r}: 'topk' needs one, the others "
                "have none."
            )
        if self.granularity == "module" and self.rescale != "none":
            raise ConfigError(
                f"granularity='module' with rescale={self.rescale!r}: rescaling cancels a mask of one value. Use "
                "rescale='none'."
            )

    def fusion_of(self, tasks: int) -> Fusion:
        """The fusion itself, for this many tasks.

        Raises:
            ConfigError: "single" with several tasks.
        """
        found: Any = (
            self.method if self.method != "somf" else self.fusion or ("single" if tasks == 1 else "task_arithmetic")
        )
        if found == "single" and tasks != 1:
            raise ConfigError(f"fusion 'single' with {tasks} tasks. Choose task_arithmetic, dare, ties or average.")
        return found

    def weights_of(self, tasks: int) -> list[float]:
        """One weight a task.

        Raises:
            ConfigError: as many weights as tasks, or one; none for "average".
        """
        fusion = self.fusion_of(tasks)
        if fusion == "average":
            if self.weights is not None:
                raise ConfigError(
                    f"weights={self.weights!r} with 'average', whose weights are 1/{tasks}. Use task_arithmetic."
                )
            return [1 / tasks] * tasks
        found = WEIGHTS[fusion] if self.weights is None else self.weights
        if isinstance(found, (int, float)):
            return [float(found)] * tasks
        if len(found) != tasks:
            raise ConfigError(f"{len(found)} weights for {tasks} tasks. Give one number, or one a task.")
        return [float(w) for w in found]

    def facts(self, tasks: int) -> dict[str, Any]:
        """What decided the result, as plain JSON values."""
        fusion = self.fusion_of(tasks)
        used = {"dare": ("drop",), "ties": ("ties_density", "ties_merge")}.get(fusion, ())
        masked = ("rescale", "temperature", "initial_density", "target_density", "export", "export_density")
        names = (*used, *(masked if self.method == "somf" else ()))
        found = {"method": self.method, "fusion": fusion, "weights": self.weights_of(tasks), "seed": self.seed}
        return found | {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass(frozen=True)
class MaskTraining:
    """How a mask is trained. Only its logits are.

    Attributes:
        objective: "dpo" on {prompt, chosen, rejected} rows; "sft" on {prompt, response} rows, which costs half.
        beta: of DPO.
        reference: DPO's reference model: "aligned" is the safe model without any task; "base" that with the safe
            adapter off too.
        lr: AdamW's peak rate, decayed linearly; published 1e-3 to 1e-2. Gates, of which there are few, bear ten times
        as much. epochs, max_steps, batch_size, gradient_accumulation, max_length, warmup_steps, seed, report_to: as in
        `transformers.TrainingArguments`.
        save_steps, checkpoint_dir, resume: write a checkpoint (logits and optimizer state) every so many steps; go on
            from the last one that is there.
        bf16: autocast, on devices that have it; the mask itself stays in fp32.
        progress: show a bar.
    """

    objective: Objective = "dpo"
    beta: float = 0.1
    reference: Reference = "aligned"
    lr: float = 1e-2
    epochs: float = 3.0
    max_steps: int = -1
    batch_size: int = 16
    gradient_accumulation: int = 1
    max_length: int = 512
    warmup_steps: int = 0
    seed: int = 0
    report_to: str = "none"
    save_steps: int | None = None
    checkpoint_dir: str | Path | None = None
    resume: bool = False
    bf16: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        for name, values in (("objective", get_args(Objective)), ("reference", get_args(Reference))):
            if getattr(self, name) not in values:
                raise ConfigError(f"{name}={getattr(self, name)!r}. Use one of {', '.join(values)}.")
        for name in ("beta", "lr", "epochs", "batch_size", "gradient_accumulation", "max_length"):
            if not (_number(getattr(self, name)) and getattr(self, name) > 0):
                raise ConfigError(f"{name}={getattr(self, name)!r} cannot train anything. Give a positive number.")
        if (self.save_steps is not None or self.resume) and self.checkpoint_dir is None:
            raise ConfigError("save_steps and resume need a checkpoint_dir. Give a directory.")


_CHOICES: dict[str, tuple[Any, ...]] = {
    "method": get_args(Method),
    "fusion": (None, *get_args(Fusion)),
    "ties_merge": get_args(Merge),
    "granularity": (None, *get_args(Granularity)),
    "rescale": get_args(Rescale),
    "export": get_args(Export),
    "layout": get_args(Layout),
}


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
