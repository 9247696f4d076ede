"""GuardSpaceConfig: an update that does not see what harmful prompts look like inside the model.

`dW = s B (A P_in)` with `P_in = I - Q Q^T`, Q the top eigenvectors of the second moment of each layer's inputs on the
calibration data. So `dW x = 0` on their span at every step, and `E||dW x||^2 <= lambda_{k+1} ||dW||_F^2` on all of
them.

Reference: Zhang et al., arXiv 2510.14301, where Q is every eigenvector whose eigenvalue is not zero. Ours: the top k,
refusals behind the prompts, general instructions in place of harmful ones, sizes per kind of module, the guard against
stalling, A frozen or in a window, and the residual that leaves the base weight unchanged.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from peft_safety.calibration.activations import estimate
from peft_safety.calibration.batches import Positions, to_batches
from peft_safety.calibration.coverage import task_inputs, warn_if_stalled
from peft_safety.calibration.grouped import GroupedMoments
from peft_safety.calibration.models import adapters_off, tokenizer_for
from peft_safety.calibration.moments import collect
from peft_safety.calibration.sizes import DEFAULT_RANK
from peft_safety.core import base_weights as weights
from peft_safety.core.certificate import Certificate
from peft_safety.core.checks import check_choices
from peft_safety.core.names import listed
from peft_safety.core.parameters import bases_of
from peft_safety.core.projection import Side
from peft_safety.core.subspace import SafetySubspace
from peft_safety.data import calibration_rows
from peft_safety.data.rows import data_rows
from peft_safety.errors import ConfigError
from peft_safety.methods.base import Layers, ProtectedConfig, option
from peft_safety.methods.factors import start_from
from peft_safety.methods.guardspace.directions import ROW_NORM, frozen_factors, windows
from peft_safety.methods.guardspace.factors import Kind, Preconditioner, irrelevant_factors

Basis = Literal["harmful", "general", "both"]
Combine = Literal["salora", None]
Train = Literal["A", "B", "window"]
Rows = Literal["task", "random"]
Init = Literal["lora", "guardspace"]
DEFAULT_BASIS: Literal["harmful"] = "harmful"
"""Held in a probe over eight times the steps, where general instructions did not; one seed."""


@dataclass
class GuardSpaceConfig(ProtectedConfig):
    """`LoraConfig` whose update is zero on the inputs that the calibration data produce.

    The defaults come from a probe on SmolLM2-135M with one seed, where a long fine-tune needed half of the dimensions.

    Args:
        subspace, safety_rank, safety_energy, safety_rank_pattern: see `ProtectedConfig`; by default a quarter of each
            module's input dimensions, calibrated at injection. The energy is `E||x||^2`.
        basis: what "auto" calibrates on: "harmful" (requests with refusals), "general" (everyday prompts, no harmful
            data at all) or "both".
        positions: tokens that count: "all", "prompt" or "response".
        combine, combine_rank: "salora" also keeps the update out of so many output directions of safe responses.
        train: "A" trains both factors, with A projected at every step; the bases stay in memory and are saved. "B"
            makes A blind once, freezes it and trains B: the adapter is a plain LoRA, at no extra cost. "window" trains
            both, with A projected onto a few directions outside the null space; these stay in memory and are saved,
            the bases are not. None (default) is "B" with `task_data` where nothing speaks against it, else "A".
        window: for train="window": directions per module (at least r).
        a_init: for train="B", the rows of A, and for train="window" the window, whose first r directions A starts
            from: "task" takes the directions outside the null space that `task_data` use most, "random" (and, with a
            warning, "task" without data) takes random ones. A subspace that holds windows gives its own.
        init: "lora" starts from B = 0; "guardspace" starts from the part of the weight that does least on the
            calibration data, with a residual that leaves function and base weight unchanged.
        preconditioner: for init="guardspace": decompose `W Sigma^(1/2)` ("root") or, as published, `W Sigma`
            ("moment").
        init_data: rows or tokenized batches behind `Sigma`; None takes those of "auto". Not saved.
        task_data: rows or tokenized batches of the benign task (32 are enough), for a_init="task" and for a warning
            where the task lies almost entirely in the null space. Not saved.

    Raises:
        ConfigError: see `ProtectedConfig`; an option out of range, or options that exclude each other.

    Reference: GuardSpace, arXiv 2510.14301, of which "guardspace" is the initialization. "B" and "window" are ours.
    """

    basis: Basis = option(DEFAULT_BASIS, "What subspace='auto' calibrates on.")
    positions: Positions = option("all", "Tokens that count in the calibration.")
    combine: Combine = option(None, "'salora' constrains the output side too.")
    combine_rank: int = option(DEFAULT_RANK, "For combine='salora': output directions per module.")
    train: Train | None = option(None, "'A': both, A projected; 'B': A blind and frozen; 'window'. See the docs.")
    window: int = option(64, "For train='window': directions per module.")
    a_init: Rows = option("task", "For train='B' and 'window': directions of A, from task_data or random.")
    init: Init = option("lora", "'lora' (B = 0) or 'guardspace' (arXiv 2510.14301).")
    preconditioner: Kind = option("root", "Root of the second moment, or (published) itself.")
    init_data: Any = option(None, "Data behind init='guardspace'. Not saved.")
    task_data: Any = option(None, "Rows of the benign task, for a_init='task' and a warning. Not saved.")

    PEFT_KEY: ClassVar[str] = "GUARDSPACE"
    UNSAVED: ClassVar[tuple[str, ...]] = ("init_data", "task_data")
    ONLY_WITH: ClassVar[dict[str, tuple[str, tuple[str, ...]]]] = {
        "combine_rank": ("combine", ("salora",)),
        "window": ("train", ("window",)),
        "a_init": ("train", ("B", "window")),
        "preconditioner": ("init", ("guardspace",)),
    }
    """Options that mean something only where another one has one of these values."""

    def __post_init__(self) -> None:
        where = type(self).__name__
        if self.train is None:
            freezable = self.init == "lora" and self.combine is None and self.a_init == "task"
            self.train = "B" if freezable and self.task_data is not None else "A"
        check_choices(self, basis=Basis, positions=Positions, combine=Combine, train=Train, a_init=Rows, init=Init)
        check_choices(self, preconditioner=Kind)
        if self.positions == "response" and self.basis != "harmful":
            raise ConfigError(f"{where}: positions='response' finds none in basis={self.basis!r}. Use 'all'.")
        if self.train != "A" and (self.init != "lora" or self.combine is not None):
            given = f"train={self.train!r} excludes init={self.init!r} and combine={self.combine!r}"
            raise ConfigError(f"{where}: {given}. Use train='A'.")
        for name, number in (("combine_rank", self.combine_rank), ("window", self.window)):
            if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                raise ConfigError(f"{where}: {name}={number!r}. Use an integer of at least 1.")
        for name in self.UNSAVED:
            data = getattr(self, name)
            if data is not None:
                setattr(self, name, data_rows(data, f"{where}: {name}"))
        super().__post_init__()

    @property
    def basis_sides(self) -> tuple[Side, ...]:
        if self.train == "window":
            return ("window",)
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

    def resolve(self, model: nn.Module, layers: Layers) -> SafetySubspace:
        """For train="window" the windows in the complement of the null space."""
        subspace = super().resolve(model, layers)
        if self.train != "window" or any("window" in sides for sides in subspace.bases.values()):
            return subspace
        left_out = set(subspace.lacking(layers, ("in",))) & set(subspace.left_out)
        base = {name: layer for name, layer in layers.items() if name not in left_out}
        if not base:
            return subspace  # which leaves out every layer: injection refuses it
        subspace.check_fits(base, ("in",))
        width = max(self.window, self.r, *(self.rank_pattern or {}).values())
        moments = self._task_moments(model, base, subspace)
        result = windows(subspace, base, width, moments)
        self._took(moments)
        return result

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
        base = bases_of(layers)
        ranks = {name: int(layer.r[adapter_name]) for name, layer in layers.items()}
        moments = self._task_moments(model, base, self.subspace, task_data)
        rows = frozen_factors(self.subspace, ranks, moments, {n: weights.shape(layer)[1] for n, layer in base.items()})
        self._took(moments)
        return rows

    def initialize(self, model: nn.Module, layers: Mapping[str, LoraLayer], adapter_name: str) -> None:
        if self.train == "window":
            self._start_in_window(layers, adapter_name)
            return
        base = bases_of(layers)
        if self.task_data is not None:
            self._check_task(model, base, self.subspace, self.task_data)
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

    @torch.no_grad()
    def _start_in_window(self, layers: Mapping[str, LoraLayer], adapter_name: str) -> None:
        """The window's first directions as the first rows of `A`; PEFT's own rows, in the window, for the rest."""
        for name, layer in layers.items():
            weight = layer.lora_A[adapter_name].raw().flatten(1)
            rows = self.subspace.bases[name]["window"].mT[: len(weight)] * ROW_NORM
            weight[: len(rows)].copy_(rows)

    def _task_moments(
        self, model: nn.Module, base: Layers, subspace: SafetySubspace, task_data: Any = None
    ) -> GroupedMoments | None:
        """What the directions of A are made from; None makes them random. `task_data` replaces the config's."""
        data = self.task_data if task_data is None else task_data
        moments = None if data is None else self._check_task(model, base, subspace, data)
        if self.a_init == "random" and task_data is None:
            return None
        if data is None:
            warnings.warn(
                "GuardSpaceConfig: without task_data, A takes random directions outside the null space. With 32 rows "
                "of the task it learns faster; set a_init='random' if you want random ones.",
                stacklevel=3,
            )
        return moments

    def _took(self, moments: GroupedMoments | None) -> None:
        """What was done is saved, not what was asked for."""
        self.a_init = "random" if moments is None else "task"

    def _check_task(self, model: nn.Module, base: Layers, subspace: SafetySubspace, data: Any) -> GroupedMoments:
        """The second moments of the task's inputs; warns if the task lies inside the null space."""
        rows = data_rows(data, "task_data")
        moments, shares = task_inputs(model, base, subspace, rows, tokenizer=tokenizer_for(model, rows))
        warn_if_stalled(shares)
        return moments
