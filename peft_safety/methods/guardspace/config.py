"""GuardSpaceConfig: an update that does not see what harmful prompts look like inside the model.

`dW = s B (A P_in)` with `P_in = I - Q Q^T`, Q the top eigenvectors of the second moment of each layer's inputs on the
calibration data. So `dW x = 0` on their span at every step, and `E||dW x||^2 <= lambda_{k+1} ||dW||_F^2` on all of
them.

Reference: Zhang et al., arXiv 2510.14301 (no public code was found). Ours: general instructions in place of harmful
prompts, sizes per kind of module, the guard against stalling, and the residual that leaves the base weight unchanged.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from peft_safety.calibration.activations import adapters_off, estimate, tokenizer_for
from peft_safety.calibration.coverage import task_inputs, warn_if_stalled
from peft_safety.calibration.moments import InputMoments, Positions, collect, to_batches
from peft_safety.calibration.sizes import DEFAULT_RANK
from peft_safety.core import base_weights as weights
from peft_safety.core.certificate import Certificate
from peft_safety.core.names import listed
from peft_safety.core.projection import Side
from peft_safety.core.subspace import SafetySubspace
from peft_safety.data import calibration_rows
from peft_safety.data.rows import data_rows
from peft_safety.errors import ConfigError
from peft_safety.methods.base import Layers, ProtectedConfig, option
from peft_safety.methods.checks import check_choices
from peft_safety.methods.guardspace.directions import frozen_factors
from peft_safety.methods.guardspace.factors import Kind, Preconditioner, irrelevant_factors
from peft_safety.methods.initial import start_from

Basis = Literal["harmful", "general", "both"]
Combine = Literal["salora", None]
Train = Literal["A", "B"]
Rows = Literal["task", "random"]
Init = Literal["lora", "guardspace"]
DEFAULT_BASIS: Literal["harmful"] = "harmful"
"""Held in a probe over eight times the steps, where general instructions did not. To be confirmed by
benchmarks/guardspace.py.
"""


@dataclass
class GuardSpaceConfig(ProtectedConfig):
    """`LoraConfig` whose update is zero on the inputs that the calibration data produce.

    The defaults (basis "harmful", a quarter of the dimensions) come from a probe on SmolLM2-135M with one seed: a
    measured choice that `benchmarks/guardspace.py` is to confirm. A long fine-tune needed half of the dimensions
    there.

    Args:
        subspace: `SafetySubspace`, file, directory, Hub id, or `"auto"` (default): calibrate at injection on the
            package's own prompts.
        basis: what "auto" calibrates on: "harmful" (requests with refusals), "general" (everyday prompts, no harmful
            data at all) or "both".
        safety_rank, safety_energy, safety_rank_pattern: size of the null space of `"auto"`, see `ProtectedConfig`; a
            quarter of each module's input dimensions by default. The energy is `E||x||^2`.
        positions: tokens that count: "all", "prompt" or "response".
        combine: "salora" also keeps the update out of the outputs of safe responses, None does not.
        combine_rank: for combine="salora" and "auto": output directions per module.
        train: "A" trains both factors, with A projected at every step; the bases stay in memory and are saved. "B"
            makes A blind once, freezes it and trains B: the adapter is a plain LoRA, at no extra cost.
        a_init: for train="B", the rows of A: "task" takes the directions outside the null space that `task_data` use
            most, "random" takes random ones. Without task data they are random too, with a warning.
        init: "lora" starts from B = 0; "guardspace" starts from the part of the weight that does least on the
            calibration data, with a residual that leaves function and base weight unchanged.
        preconditioner: for init="guardspace": decompose `W Sigma^(1/2)` ("root") or `W Sigma` ("moment").
        init_data: for init="guardspace": rows or tokenized batches behind `Sigma`; None takes those of "auto". Not
            saved.
        task_data: rows or tokenized batches of the benign task (32 are enough), for a_init="task" and for a warning
            where the task lies almost entirely in the null space. Not saved.

    Raises:
        ConfigError: see `ProtectedConfig`; values out of range, or that do not go together.
    """

    basis: Basis = option(DEFAULT_BASIS, "What subspace='auto' calibrates on.")
    positions: Positions = option("all", "Tokens that count in the calibration.")
    combine: Combine = option(None, "'salora' constrains the output side too.")
    combine_rank: int = option(DEFAULT_RANK, "For combine='salora': output directions per module.")
    train: Train = option("A", "'A' trains both factors, projected; 'B' freezes a blind A: a plain LoRA.")
    a_init: Rows = option("task", "For train='B': rows of A, from task_data or random.")
    init: Init = option("lora", "'lora' (B = 0) or 'guardspace' (arXiv 2510.14301).")
    preconditioner: Kind = option("root", "Square root of the second moment, or itself.")
    init_data: Any = option(None, "Data behind init='guardspace'. Not saved.")
    task_data: Any = option(None, "Rows of the benign task, for train='B' and a warning. Not saved.")

    PEFT_KEY: ClassVar[str] = "GUARDSPACE"
    UNSAVED: ClassVar[tuple[str, ...]] = ("init_data", "task_data")

    def __post_init__(self) -> None:
        where = type(self).__name__
        check_choices(self, basis=Basis, positions=Positions, combine=Combine, train=Train, a_init=Rows, init=Init)
        check_choices(self, preconditioner=Kind)
        if self.positions == "response" and self.basis != "harmful":
            raise ConfigError(
                f"{where}: basis={self.basis!r} has no responses, so positions='response' finds none. Use 'all' or "
                "'prompt'."
            )
        if self.train == "B" and (self.init != "lora" or self.combine is not None):
            raise ConfigError(
                f"{where}: train='B' excludes init={self.init!r} and combine={self.combine!r}. Use train='A'."
            )
        if not isinstance(self.combine_rank, int) or isinstance(self.combine_rank, bool) or self.combine_rank < 1:
            raise ConfigError(f"{where}: combine_rank={self.combine_rank!r}. Use an integer of at least 1.")
        for name in self.UNSAVED:
            data = getattr(self, name)
            if data is not None:
                setattr(self, name, data_rows(data, f"{where}: {name}"))
        super().__post_init__()

    @property
    def basis_sides(self) -> tuple[Side, ...]:
        return ("in",) if self.combine is None else ("in", "out")

    @property
    def sides(self) -> tuple[Side, ...]:
        return () if self.freezes else self.basis_sides

    @property
    def freezes(self) -> bool:
        return self.train == "B"

    @classmethod
    def from_certificate(cls, config: LoraConfig, certificate: Certificate) -> GuardSpaceConfig:
        """The config of a plain LoRA directory with this certificate. It has no bases."""
        common = {entry.name: getattr(config, entry.name) for entry in fields(LoraConfig) if entry.init}
        result = cls(**common, train="B", subspace=None)
        result._certificate = certificate
        return result

    @property
    def residual(self) -> bool:
        return self.init == "guardspace"

    @property
    def calibration(self) -> dict[str, Any]:
        return {"method": "guardspace", "basis": self.basis, "positions": self.positions}

    def calibrate(
        self, model: nn.Module, layers: Layers, data: Any = None, tokenizer: Any = None, **options: Any
    ) -> SafetySubspace:
        """With `combine`, a second pass over the package's refusals gives the output side, whatever `data` are."""
        subspace = super().calibrate(model, layers, data, tokenizer, **options)
        if self.combine is None:
            return subspace
        pairs = calibration_rows("salora")
        options |= {"tokenizer": tokenizer or tokenizer_for(model, pairs), "layers": layers, "allow_fewer": True}
        return subspace.beside(estimate(model, pairs, method="salora", rank=self.combine_rank, **options))

    def frozen_rows(
        self, model: nn.Module, layers: Mapping[str, LoraLayer], adapter_name: str, task_data: Any = None
    ) -> dict[str, Tensor]:
        base = {name: layer.get_base_layer() for name, layer in layers.items()}
        ranks = {name: int(layer.r[adapter_name]) for name, layer in layers.items()}
        data = self.task_data if task_data is None else task_data
        moments = None if data is None else self._check_task(model, base, data)
        if self.a_init == "random" and task_data is None:
            moments = None
        elif data is None:
            warnings.warn(
                "GuardSpaceConfig: without task_data the rows of the frozen A are random directions outside the null "
                "space. With 32 rows of the task it learns faster; set a_init='random' if you want random ones.",
                stacklevel=2,
            )
        return frozen_factors(self.subspace, ranks, moments)

    def initialize(self, model: nn.Module, layers: Mapping[str, LoraLayer], adapter_name: str) -> None:
        base = {name: layer.get_base_layer() for name, layer in layers.items()}
        if self.task_data is not None:
            self._check_task(model, base, self.task_data)
        if self.init == "lora":
            return
        own = self.init_data is None
        rows = calibration_rows("guardspace", self.basis) if own else data_rows(self.init_data, "init_data")
        tokenizer = tokenizer_for(model, rows)
        batches, _ = to_batches(rows, tokenizer, batch_size=8, max_length=512, model=model)
        with adapters_off(model):
            moments = collect(model, base, batches, positions=self.positions, what="calibrating (init)")
        unseen = [name for name in layers if not moments.reaches(name)]
        if unseen:
            warnings.warn(
                f"{len(unseen)} of {len(layers)} layers see nothing of the data behind init='guardspace', and start "
                f"as plain LoRA's do: {listed(unseen)}.",
                stacklevel=2,
            )
        prepared: dict[int, Preconditioner] = {}
        for name in filter(moments.reaches, layers):
            moment = moments.moment(name)
            if id(moment) not in prepared:  # modules with one input share it; only the last one is kept
                prepared = {id(moment): Preconditioner.of(moment, self.preconditioner, name)}
            weight = weights.dense_weight(base[name], name).to(moment.device)
            rank = min(int(layers[name].r[adapter_name]), *weight.shape)
            b, a = irrelevant_factors(weight, prepared[id(moment)], rank, name)
            start_from(layers[name], adapter_name, b, a)

    def _check_task(self, model: nn.Module, base: Mapping[str, nn.Module], data: Any) -> InputMoments:
        """The second moments of the task's inputs; warns if the task lies inside the null space."""
        rows = data_rows(data, "task_data")
        moments, shares = task_inputs(model, base, self.subspace, rows, tokenizer=tokenizer_for(model, rows))
        warn_if_stalled(shares)
        return moments
