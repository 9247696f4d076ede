"""What a fusion will do, found out before anything is trained or written."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from peft_safety.errors import ConfigError
from peft_safety.methods.somf.compose import Continued, Independent, Shape, Update, mask_shape
from peft_safety.methods.somf.inputs import Adapters, Checkpoints, Source, read_inputs
from peft_safety.methods.somf.masks import Granularity
from peft_safety.methods.somf.options import FuseOptions
from peft_safety.naming import public_name

NONLINEAR = ("dare", "ties")
"""Fusions that work entry by entry, so that independent adapters leave no low rank under them."""
COPIES = 3
"""fp32 copies of the logits that training cannot do without: themselves and AdamW's two moments."""


@dataclass(frozen=True)
class PlannedModule:
    """One module (one tensor of a checkpoint): shape of the weight, rank of every input and of the result (0: full
    weights), and its logits.
    """

    name: str
    shape: tuple[int, ...]
    ranks: tuple[int, ...]
    rank: int
    logits: int


@dataclass(frozen=True)
class FusePlan:
    """The whole of it.

    Attributes:
        layout: "continued", "independent" or "checkpoints".
        granularity: of the mask; None where there is none.
        training_bytes: the mask's logits and optimizer state; the floor of what training adds to the model and the
            frozen task factors.
        result: in words.
    """

    layout: str
    granularity: Granularity | None
    method: str
    fusion: str
    weights: tuple[float, ...]
    safe: str
    tasks: tuple[str, ...]
    modules: tuple[PlannedModule, ...]
    result: str

    @property
    def logits(self) -> int:
        """Of all modules."""
        return sum(module.logits for module in self.modules)

    @property
    def training_bytes(self) -> int:
        return 4 * COPIES * self.logits

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "logits": self.logits, "training_bytes": self.training_bytes}


def plan_fusion(
    safe: Source | None, tasks: Sequence[Source], *, model: nn.Module | None = None, **options: Any
) -> FusePlan:
    """Read and check the inputs of `fuse`, and say what it would do. Nothing is trained or written.

    Args:
        **options: see `FuseOptions`.

    Raises:
        PeftSafetyError: see `fuse`.
    """
    chosen = FuseOptions(**options)
    inputs = read_inputs(safe, tasks, model, chosen)
    return plan_of(inputs, chosen, safe, tasks)


def plan_of(
    inputs: Adapters | Checkpoints, options: FuseOptions, safe: Source | None, tasks: Sequence[Source]
) -> FusePlan:
    """The plan for inputs that are read.

    Raises:
        ConfigError: a combination of inputs and options that means nothing.
    """
    fusion, granularity = options.fusion_of(len(tasks)), granularity_of(inputs, options)
    if isinstance(inputs, Checkpoints):
        layout, modules = (
            "checkpoints",
            tuple(_planned_tensor(key, shape, granularity, options) for key, shape in inputs.fused.items()),
        )
        result = (
            "sharded safetensors" if options.rank is None else f"a LoRA of rank {options.rank} on the safe checkpoint"
        )
    else:
        layout = "continued" if inputs.continued else "independent"
        modules = tuple(_planned_module(name, inputs, granularity, options) for name in inputs.modules)
        result = f"a LoRA of rank {max(module.rank for module in modules)}"
    names = (
        "the base model" if safe is None else public_name(os.fspath(safe)),
        tuple(public_name(os.fspath(task)) for task in tasks),
    )
    return FusePlan(
        layout, granularity, options.method, fusion, tuple(options.weights_of(len(tasks))), *names, modules, result
    )


def granularity_of(inputs: Adapters | Checkpoints, options: FuseOptions) -> Granularity | None:
    """Of the mask, None without one.

    Raises:
        ConfigError: a granularity or fusion that these inputs cannot have.
    """
    independent = isinstance(inputs, Adapters) and not inputs.continued
    fusion = options.fusion_of(len(inputs.tasks))
    if independent and fusion in NONLINEAR:
        if options.method == "somf":
            raise ConfigError(
                f"fusion={fusion!r} works entry by entry, and independent adapters have no entries in common. Use "
                "task_arithmetic or average, or adapters "
                "that were trained on from the safe one."
            )
        if options.rank is None:
            raise ConfigError(
                f"method={fusion!r} of independent adapters gives a dense update. State the rank= of the LoRA it is "
                "compressed to."
            )
    if options.method != "somf":
        return None
    if options.granularity == "rank" and isinstance(inputs, Checkpoints):
        raise ConfigError(
            "granularity='rank' needs adapters; full weights have no rank components. Use element, row or module."
        )
    return options.granularity or ("rank" if independent else "element")


def updates_of(inputs: Adapters, granularity: Granularity | None, options: FuseOptions) -> dict[str, Update]:
    """What is fused, module by module."""
    found: dict[str, Update] = {}
    for name in inputs.modules:
        tasks = [task.factors[name] for task in inputs.tasks]
        safe = None if inputs.safe is None else inputs.safe.factors[name]
        if inputs.continued and safe is not None:
            found[name] = Continued(name, safe, tasks, granularity or "element", options)
        else:
            found[name] = Independent(name, safe, tasks, granularity or "rank", options)
    return found


def _planned_module(
    name: str, inputs: Adapters, granularity: Granularity | None, options: FuseOptions
) -> PlannedModule:
    factors = [adapter.factors[name] for adapter in ([inputs.safe] if inputs.safe else []) + list(inputs.tasks)]
    m, n = factors[0].b.shape[0], factors[0].a.shape[1]
    ranks = tuple(factor.a.shape[0] for factor in factors)
    own = ranks[0] if inputs.continued else sum(ranks)
    rank = (
        min(own, m, n, options.rank or own)
        if options.fusion_of(len(inputs.tasks)) not in NONLINEAR or inputs.continued
        else min(options.rank or own, m, n)
    )
    tasks = ranks[1:] if inputs.safe else ranks
    if granularity is None:
        logits = 0
    elif inputs.continued:
        logits = {"element": own * (m + n), "row": own + m, "rank": own, "module": 1}[granularity]
    else:
        logits = {"row": m, "rank": sum(tasks), "module": len(tasks)}.get(granularity, 0)
    return PlannedModule(name, (m, n), ranks, rank, logits)


def _planned_tensor(key: str, shape: Shape, granularity: Granularity | None, options: FuseOptions) -> PlannedModule:
    logits = 0 if granularity is None else math.prod(mask_shape(shape, granularity, key))
    rank = min(options.rank, *shape) if options.rank and is_linear(key, shape) else 0
    return PlannedModule(key, shape, (), rank, logits)


def is_linear(key: str, shape: Shape) -> bool:
    """Whether a tensor of a checkpoint is the weight of a linear layer that a LoRA can update: 2-D, and neither an
    embedding nor the head.
    """
    module = key.removesuffix(".weight").rpartition(".")[2]
    return (
        key.endswith(".weight")
        and len(shape) == 2
        and module not in ("embed_tokens", "wte", "wpe", "embed_in", "word_embeddings", "lm_head", "embed_out")
    )
