"""OrthoSafetyPatchConfig: plain LoRA for refusals, kept out of the directions that the model's abilities use.
`dW = s P_out (B A) P_in` with `P = I - Q Q^T`; Q spans what general data, or the weight itself, uses most, and what
earlier patches have taken.

Reference: Mou et al., arXiv 2510.09004, which observes that refusal LoRAs are nearly orthogonal to the weight. To
enforce it, and how, is our own.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn

from peft_safety.calibration.weights import estimate_from_weights
from peft_safety.core.checks import check_choices, is_number
from peft_safety.core.names import public_name
from peft_safety.core.projection import Side, is_tokens
from peft_safety.core.subspace import SafetySubspace
from peft_safety.data import CALIBRATION_PAIRS, refusal_pairs
from peft_safety.errors import ConfigError
from peft_safety.methods.base import Layers, ProtectedConfig, option
from peft_safety.methods.ortho_patch.priors import prior_spans

Mode = Literal["none", "soft", "hard"]
Basis = Literal["weight", "activation", "contrastive"]
SideName = Literal["in", "out", "both"]
REG_LAMBDA = 100.0
"""An unconstrained patch of SmolLM2-135M has a penalty of about 0.02 (0.9 % of each layer's output, squared, times 210
layers): a weight of 1 would have no effect."""
SIDES: dict[str, tuple[Side, ...]] = {"out": ("out",), "in": ("in",), "both": ("out", "in")}
"""Values of `side`, and the sides of the update that they name."""


@dataclass
class OrthoSafetyPatchConfig(ProtectedConfig):
    """`LoraConfig` for a safety patch.

    Args:
        mode: "hard" constrains the update to the complement of the basis; "soft" penalizes its energy on the data of
            the basis (train with `SoftPenaltyCallback`); "none" is plain LoRA, the published method, which only
            remembers the basis for its diagnostics.
        basis: "weight" (top singular vectors of W), "activation" (what general data uses), or "contrastive" (what it
            uses and harmful requests do not).
        side: "in" (on lora_A), "out" (on lora_B) or "both".
        subspace, safety_rank, safety_energy, safety_rank_pattern: see `ProtectedConfig`; by default estimated at
            injection on the package's general prompts, 32 directions per module. safety_rank=0 protects earlier
            patches only.
        prior_patches: adapters on the model, or directories, that the new patch is exactly orthogonal to. Keep them
            frozen.
        reg_lambda: weight of the penalty for mode="soft", in units of the loss per unit of `E||dW x||^2 / E||W x||^2`,
            summed over the modules.

    Raises:
        ConfigError: see `ProtectedConfig`; an option out of range, a soft mode on another basis or side, or patches
            that are not there.

    Reference: Mou et al., arXiv 2510.09004, whose patches are those of mode "none". The constraint is ours.
    """

    mode: Mode = option("hard", "'hard', 'soft' or 'none'.")
    basis: Basis = option("activation", "Where subspace='auto' comes from.")
    side: SideName = option("in", "Constrained side of the update.")
    prior_patches: list[str] | None = option(None, "Earlier patches to be orthogonal to: adapters or directories.")
    reg_lambda: float = option(REG_LAMBDA, "Weight of the penalty for mode='soft'.")

    PEFT_KEY: ClassVar[str] = "ORTHOSAFETYPATCH"
    LEAST_RANK: ClassVar[int] = 0

    def __post_init__(self) -> None:
        where = type(self).__name__
        check_choices(self, mode=Mode, basis=Basis, side=SideName)
        if self.mode == "soft" and (self.basis == "weight" or self.side != "in"):
            given = f"(not {self.basis!r}) and side='in' (not {self.side!r})"
            raise ConfigError(f"{where}: mode='soft' needs basis='activation' or 'contrastive' {given}.")
        if not (is_number(self.reg_lambda) and self.reg_lambda > 0):
            raise ConfigError(f"{where}: reg_lambda={self.reg_lambda!r}. Use a finite number above 0.")
        self._check_priors(where)
        super().__post_init__()
        self._penalized = False

    def _check_priors(self, where: str) -> None:
        self.prior_patches = [os.fspath(prior) for prior in self.prior_patches or []] or None
        names = [os.path.normpath(prior) for prior in self.prior_patches or []]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(f"{where}: prior_patches names {twice[0]!r} twice. Name each earlier patch once.")
        if names and self.mode != "hard":
            remedy = "Use mode='hard', with safety_rank=0 to be orthogonal to them only."
            raise ConfigError(f"{where}: prior_patches are a constraint; mode={self.mode!r} has none. {remedy}")
        if self.safety_rank == 0 and not names:
            raise ConfigError(f"{where}: safety_rank=0 without prior_patches constrains nothing. Use mode='none'.")
        if self.safety_rank == 0 and self.safety_rank_pattern:
            given = f"safety_rank_pattern={self.safety_rank_pattern!r}"
            raise ConfigError(f"{where}: {given} has no effect with safety_rank=0. Leave out one.")

    @property
    def basis_sides(self) -> tuple[Side, ...]:
        return SIDES[self.side]

    @property
    def sides(self) -> tuple[Side, ...]:
        return self.basis_sides if self.mode == "hard" else ()

    def resolve(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> SafetySubspace:
        if self._stored is not None:  # what it was trained with, earlier patches included
            return super().resolve(model, layers)
        own = None if self.safety_rank == 0 and self.subspace == "auto" else super().resolve(model, layers)
        if not self.prior_patches:
            assert own is not None
            self._check_spectrum(own, layers)
            return own
        spans, source = prior_spans(model, layers, self.prior_patches, self.basis_sides)
        gone = own.left_out if own else {}
        extended = SafetySubspace.joined(own, {name: sides for name, sides in spans.items() if name not in gone})
        bases = [extended.bases[name][side] for side in self.basis_sides for name in layers if name not in gone]
        left = min(u.shape[0] - u.shape[1] for u in bases if not is_tokens(u))
        extended.provenance |= {"prior_patches": source, "capacity_left": left}
        return extended

    @property
    def calibration(self) -> dict[str, Any]:
        against = None
        if self.basis == "contrastive":
            against = [{"prompt": row["prompt"]} for row in refusal_pairs("calibration", CALIBRATION_PAIRS)]
        return {"method": "ortho_patch", "basis": "general", "sides": self.basis_sides, "against": against}

    def calibrate(
        self, model: nn.Module, layers: Layers, data: Any = None, tokenizer: Any = None, **options: Any
    ) -> SafetySubspace:
        if self.basis != "weight":
            return super().calibrate(model, layers, data, tokenizer, **options)
        if data is not None:
            raise ConfigError("OrthoSafetyPatchConfig: basis='weight' reads weights only. Leave data out.")
        for name in ("memory", "max_length"):  # one weight at a time, and no rows
            options.pop(name, None)
        return estimate_from_weights(model, sides=self.basis_sides, layers=layers, **self.subspace_size, **options)

    def _check_spectrum(self, subspace: SafetySubspace, layers: Mapping[str, nn.Module]) -> None:
        known = {*subspace.left_out, *(name for name, spectra in subspace.spectra.items() if "in" in spectra)}
        lacking = sorted(layers.keys() - known)
        if self.mode == "soft" and (lacking or subspace.provenance.get("method") == "weight"):
            what = f"{lacking[0]} has no input spectrum" if lacking else "it comes from weights"
            remedy = "Estimate it with SafetySubspace.from_activations(..., method='ortho_patch')."
            raise ConfigError(f"mode='soft' needs a data basis with the energy in each direction: {what}. {remedy}")

    @property
    def unfinished(self) -> str | None:
        if self.mode != "soft" or self._penalized or self._stored is not None:
            return None
        return "mode='soft' was trained without its penalty, or not at all. Train with SoftPenaltyCallback."

    def to_dict(self) -> dict[str, Any]:
        result = super().to_dict()
        result["prior_patches"] = [public_name(prior) for prior in self.prior_patches] if self.prior_patches else None
        return result
