"""GuardSpaceConfig: an update that cannot see what harmful prompts look like inside the model.

`dW = s B (A P_in)` with `P_in = I - Q Q^T`, Q the top eigenvectors of the second moment of each layer's inputs on the
calibration data. So `dW x = 0` on their span at every step, and `E||dW x||^2 <= lambda_{k+1} ||dW||_F^2` on all of
them.

Reference: Zhang et al., arXiv 2510.14301, of which no public code was found. That general instructions may stand in
for harmful prompts, the sizes per kind of module, the guard against stalling and the residual that leaves the base
weight alone are ours.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from peft.tuners.lora import LoraLayer
from torch import nn

from peft_safety.calibration.activations import GUARDSPACE_FRACTION, adapters_off, estimate, size_of, tokenizer_of
from peft_safety.calibration.coverage import task_shares, warn_if_stalled
from peft_safety.calibration.moments import InputMoments, collect, is_tokenized, to_batches
from peft_safety.core import base_weights as weights
from peft_safety.core.names import listed
from peft_safety.core.projection import Side
from peft_safety.core.subspace import SafetySubspace
from peft_safety.data import CALIBRATION_PAIRS, calibration_rows, refusal_pairs
from peft_safety.data.rows import data_rows
from peft_safety.errors import ConfigError
from peft_safety.methods.base import ProtectedConfig
from peft_safety.methods.guardspace.factors import Preconditioner, irrelevant_factors
from peft_safety.methods.initial import start_from

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
        k, energy, fraction: size of each module's null space, at most one of them: directions, as many as hold this
            share of `E||x||^2`, or a share of the input dimensions (default 1/4).
        per_kind: another value of the same unit for modules whose name ends so: `{"down_proj": 0.1}`.
        positions: tokens that count: "all", "prompt" or "response".
        combine: "salora" also keeps the update out of the outputs of safe responses (`safety_rank` directions for
            "auto"), None does not.
        init: "lora" starts from B = 0; "guardspace" from the part of the weight that does least on the calibration
            data, with a residual that leaves the function, and the base weight, unchanged.
        preconditioner: for init="guardspace": decompose `W Sigma^(1/2)` ("root") or `W Sigma` ("moment").
        init_data: for init="guardspace": rows or tokenized batches behind `Sigma`; None takes those of "auto". Not
            saved.
        task_data: rows or tokenized batches of the benign task; if given, a warning says when it lies in the null
            space almost entirely. Not saved.

    Raises:
        ConfigError: see `ProtectedConfig`; values out of range, or that do not go together.
    """

    basis: Literal["harmful", "general", "both"] = field(
        default=DEFAULT_BASIS, metadata={"help": "What subspace='auto' calibrates on."}
    )
    k: int | None = field(default=None, metadata={"help": "Protected input directions per module."})
    energy: float | None = field(
        default=None, metadata={"help": "Or as many as hold this share of the inputs' energy."}
    )
    fraction: float | None = field(
        default=None, metadata={"help": "Or a share of the input dimensions; 1/4 if none of the three is given."}
    )
    per_kind: dict[str, float] | None = field(
        default=None, metadata={"help": "Other values of the same unit by kind of module."}
    )
    positions: Literal["all", "prompt", "response"] = field(
        default="all", metadata={"help": "Tokens that count in the calibration."}
    )
    combine: Literal["salora"] | None = field(
        default=None, metadata={"help": "'salora' constrains the output side too."}
    )
    init: Literal["lora", "guardspace"] = field(
        default="lora", metadata={"help": "'lora' (B = 0) or 'guardspace' (arXiv 2510.14301)."}
    )
    preconditioner: Literal["root", "moment"] = field(
        default="root", metadata={"help": "Square root of the second moment, or itself."}
    )
    init_data: Any = field(default=None, metadata={"help": "Data behind init='guardspace'. Not saved."})
    task_data: Any = field(
        default=None,
        metadata={"help": "Rows of the benign task, to be warned of a null space that covers it. Not saved."},
    )

    PEFT_KEY: ClassVar[str] = "GUARDSPACE"
    UNSAVED: ClassVar[tuple[str, ...]] = ("init_data", "task_data")

    def __post_init__(self) -> None:
        where = type(self).__name__
        choices = {
            "basis": ("harmful", "general", "both"),
            "positions": ("all", "prompt", "response"),
            "combine": (None, "salora"),
            "init": ("lora", "guardspace"),
            "preconditioner": ("root", "moment"),
        }
        for name, values in choices.items():
            if getattr(self, name) not in values:
                raise ConfigError(
                    f"{where}: {name}={getattr(self, name)!r}. Use one of {', '.join(map(repr, values))}."
                )
        if self.positions == "response" and self.basis != "harmful":
            raise ConfigError(
                f"{where}: basis={self.basis!r} has prompts without responses, so positions='response' finds none. "
                "Use 'all' or 'prompt'."
            )
        self._check_size(where)
        for name in self.UNSAVED:
            data = getattr(self, name)
            if data is not None:
                setattr(self, name, data_rows(data, f"{where}: {name}"))
        super().__post_init__()

    def _check_size(self, where: str) -> None:
        sizes = {name: getattr(self, name) for name in ("k", "energy", "fraction") if getattr(self, name) is not None}
        if len(sizes) > 1:
            raise ConfigError(
                f"{where}: {' and '.join(f'{name}={value!r}' for name, value in sizes.items())}: give one of k, "
                "energy and fraction."
            )
        if not sizes:
            self.fraction = GUARDSPACE_FRACTION
        if self.per_kind is not None and (
            not isinstance(self.per_kind, Mapping) or not all(isinstance(kind, str) for kind in self.per_kind)
        ):
            raise ConfigError(
                f"{where}: per_kind={self.per_kind!r}. Map kinds of modules to numbers: {{'down_proj': 0.1}}."
            )
        for value in (next(iter(sizes.values()), self.fraction), *(self.per_kind or {}).values()):
            if self.fraction is not None and not (isinstance(value, float) and 0 < value < 1):
                raise ConfigError(
                    f"{where}: fraction={value!r}. Use a number between 0 and 1: at 1 the null space covers "
                    "everything."
                )
            size_of(None, value) if self.energy is not None else size_of(value)
            if self.k is not None and not (isinstance(value, int) and value >= 1):
                raise ConfigError(f"{where}: k={value!r}. Use an integer of at least 1.")

    @property
    def basis_sides(self) -> tuple[Side, ...]:
        return ("in",) if self.combine is None else ("in", "out")

    @property
    def residual(self) -> bool:
        return self.init == "guardspace"

    def calibrate(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        *,
        tokenizer: Any = None,
        seed: int = 0,
        progress: bool = True,
    ) -> SafetySubspace:
        """The subspace of `subspace="auto"`: one pass over the model, and with `combine` a second one over its
        responses.

        Args:
            tokenizer: default the one under the model's own name.
        """
        common: dict[str, Any] = {
            "tokenizer": tokenizer or tokenizer_of(model),
            "layers": layers,
            "seed": seed,
            "allow_fewer": True,
            "progress": progress,
        }
        size: dict[str, Any] = {
            "rank": self.k if self.fraction is None else self.fraction,
            "energy": self.energy,
            "per_kind": self.per_kind,
        }
        subspace = estimate(
            model,
            calibration_rows("guardspace", self.basis),
            method="guardspace",
            positions=self.positions,
            **size,
            **common,
        )
        subspace.provenance["source"] = f"peft_safety's own prompts, basis {self.basis!r}"
        if self.combine is None:
            return subspace
        pairs = refusal_pairs("calibration", CALIBRATION_PAIRS)
        return subspace.beside(estimate(model, pairs, method="salora", rank=self.safety_rank, **common))

    def initialize(self, model: nn.Module, layers: Mapping[str, LoraLayer], adapter_name: str) -> None:
        base = {name: layer.get_base_layer() for name, layer in layers.items()}
        if self.task_data is not None:
            rows = data_rows(self.task_data, "task_data")
            warn_if_stalled(task_shares(model, base, self.subspace, rows, tokenizer=self._tokenizer(model, rows)))
        if self.init == "lora":
            return
        moments = self._moments(model, base)
        prepared: dict[int, Preconditioner] = {}
        unseen = [name for name in layers if not moments.reaches(name)]
        if unseen:
            warnings.warn(
                f"{len(unseen)} of {len(layers)} layers see nothing of the data behind init='guardspace', and start "
                f"as plain LoRA's do: {listed(unseen)}.",
                stacklevel=2,
            )
        for name, layer in layers.items():
            if name in unseen:
                continue
            moment = moments.moment(name)
            if id(moment) not in prepared:  # modules with one input share it; one at a time is kept
                prepared = {id(moment): Preconditioner.of(moment, self.preconditioner, name)}
            weight = weights.dense_weight(base[name], name).to(moment.device)
            b, a = irrelevant_factors(
                weight, prepared[id(moment)], min(int(layer.r[adapter_name]), *weight.shape), name
            )
            start_from(layer, adapter_name, b, a)

    def _moments(self, model: nn.Module, base: Mapping[str, nn.Module]) -> InputMoments:
        rows: Sequence[Any] = (
            calibration_rows("guardspace", self.basis)
            if self.init_data is None
            else data_rows(self.init_data, "init_data")
        )
        batches, _ = to_batches(rows, self._tokenizer(model, rows), batch_size=8, max_length=512, model=model)
        with adapters_off(model):
            return collect(model, base, batches, positions=self.positions, what="calibrating (init)")

    @staticmethod
    def _tokenizer(model: nn.Module, rows: Sequence[Any]) -> Any:
        return None if is_tokenized(rows) else tokenizer_of(model)
