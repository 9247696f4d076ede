"""What all protected configs share: `LoraConfig` plus a subspace, and the refusal of what cannot be protected."""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING, Any, ClassVar

from peft import LoraConfig
from torch import nn

from peft_safety.calibration.sizes import check_size_options
from peft_safety.core import files
from peft_safety.core.adapter_dir import StoredAdapter, sign
from peft_safety.core.certificate import Certificate
from peft_safety.core.plain_lora import INITS, MANIFEST, NOT_PROTECTED, check_features, check_sizes
from peft_safety.core.projection import Side
from peft_safety.core.subspace import SafetySubspace
from peft_safety.core.subspace_file import FILE_NAME
from peft_safety.data import calibration_rows
from peft_safety.errors import ConfigError

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer
    from torch import Tensor

LAYER_BUILDERS: set[CodeType] = set()
"""The functions in which PEFT's layers make their factors from a config. `registry` fills this set."""


@dataclass
class ProtectedConfig(LoraConfig):
    """Base of the protected configs. Not meant to be used itself.

    Args:
        subspace: a `SafetySubspace`, a file, a directory, a Hub id, or `"auto"` to calibrate when the adapter is
            injected.
        safety_rank: size of the subspace of `"auto"`: directions per module, an integer; or a share of its features, a
            float in (0, 1). None takes the method's default. A given subspace has its own size.
        safety_energy: instead, as many directions as hold this share of the energy.
        safety_rank_pattern: other values of either by the end of a module's name: `{"down_proj": 0.1}`.
        safety_artifact: written by `save_pretrained`; leave it alone.

    Raises:
        ConfigError: a LoRA feature that cannot be protected, or numbers out of range.
    """

    subspace: Any = field(
        default="auto", metadata={"help": "SafetySubspace, path, Hub id, or 'auto' to calibrate at injection."}
    )
    safety_rank: int | float | None = field(
        default=None,
        metadata={"help": "For subspace='auto': protected directions per module, or a share of its features."},
    )
    safety_energy: float | None = field(
        default=None, metadata={"help": "Instead of safety_rank: as many directions as hold this share of the energy."}
    )
    safety_rank_pattern: dict[str, int | float] | None = field(
        default=None, metadata={"help": "Other values of safety_rank or safety_energy by the end of a module's name."}
    )
    safety_artifact: dict[str, Any] | None = field(
        default=None, metadata={"help": "Hashes of the saved files; written by save_pretrained."}
    )

    PEFT_KEY: ClassVar[str] = ""
    UNSAVED: ClassVar[tuple[str, ...]] = ()  # data: what came of them is saved, they are not
    LEAST_RANK: ClassVar[int] = 1

    def __post_init__(self) -> None:
        where = type(self).__name__
        check_features(self, f"{where}(target_modules={self.target_modules!r})", NOT_PROTECTED, INITS)
        if self.bias != "none":
            raise ConfigError(
                f"{where}: bias={self.bias!r} trains base biases, which no projection constrains. Use bias='none'."
            )
        check_sizes(vars(self), where)
        check_size_options(
            self.safety_rank, self.safety_energy, self.safety_rank_pattern, where, least=self.LEAST_RANK
        )
        super().__post_init__()
        self._stored: StoredAdapter | None = None
        self._origin: Any = None  # `registry.reuse.Origin` of the adapter that was made from it
        self._mark: str | None = None
        self._injecting = False
        self._combined = False  # PEFT fills its factors with a combination of other adapters
        self._partial = False  # layers that the target patterns match were left out
        self._modules: dict[str, tuple[int, float]] = {}  # what injection found: rank and alpha by module
        self._certificate: Certificate | None = None  # of an adapter whose lora_A is frozen
        self._accepted: dict[str, frozenset[str]] = {}  # digests of its lora_A, by module

    @property
    def use_rslora(self) -> bool:
        """LoRA's field. Every layer reads it when it makes its factors, so a layer that is built past the injection,
        which would not be protected, is refused here.
        """
        if sys._getframe(1).f_code in LAYER_BUILDERS and not self._injecting:
            raise ConfigError(
                f"{type(self).__name__}: a layer built by itself would not be protected. Use get_peft_model, "
                "add_adapter or inject_adapter_in_model."
            )
        value: bool = self.__dict__["use_rslora"]
        return value

    @use_rslora.setter
    def use_rslora(self, value: bool) -> None:
        self.__dict__["use_rslora"] = value

    @property
    def basis_sides(self) -> tuple[Side, ...]:
        """Sides of the update that the subspace has a basis for."""
        return ("out",)

    @property
    def sides(self) -> tuple[Side, ...]:
        """Sides that are constrained to the complement of that basis."""
        return self.basis_sides

    @property
    def residual(self) -> bool:
        """Whether the layers carry frozen initial factors."""
        return False

    @property
    def freezes(self) -> bool:
        """Whether `lora_A` is made blind once and frozen, so that the adapter is a plain LoRA."""
        return False

    @property
    def is_plain(self) -> bool:
        """Whether what is saved is a plain LoRA with a certificate beside it."""
        return self.freezes and self._certificate is not None

    @property
    def subspace_id(self) -> str:
        """Digest of the bases that constrain the adapter."""
        return self.subspace.digest if self._certificate is None else self._certificate.subspace

    @property
    def subspace_size(self) -> dict[str, Any]:
        """What was asked for, as the arguments of `estimate` and `estimate_from_weights`."""
        return {"rank": self.safety_rank, "energy": self.safety_energy, "per_kind": self.safety_rank_pattern}

    def resolve(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> SafetySubspace:
        """The subspace itself: as given, loaded, or calibrated on the package's own data. `layers` are the base layers
        by name.
        """
        if isinstance(self.subspace, SafetySubspace):
            return self.subspace
        if self.subspace == "auto":
            return self.calibrate(model, layers)
        if isinstance(self.subspace, (str, os.PathLike)):
            return SafetySubspace.load(self.subspace)
        raise ConfigError(
            f"{type(self).__name__}: subspace is a {type(self.subspace).__name__}. Give a SafetySubspace, a path, a "
            "Hub id, or 'auto'."
        )

    def calibrate(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> SafetySubspace:
        """What `subspace="auto"` means: an estimate on the package's own data."""
        from peft_safety.calibration.activations import estimate, tokenizer_of

        subspace = estimate(
            model, calibration_rows("salora"), tokenizer=tokenizer_of(model), layers=layers, **self.subspace_size
        )
        subspace.provenance["source"] = "peft_safety refusal pairs, calibration split"
        return subspace

    @property
    def unfinished(self) -> str | None:
        """What is still missing for the adapter to be what its config says, for a warning when it is saved."""
        return None

    def frozen_rows(
        self, model: nn.Module, layers: Mapping[str, LoraLayer], adapter_name: str, task_data: Any = None
    ) -> dict[str, Tensor]:
        """`A (r, n)`, fp32, of every layer, for a method that `freezes`. `task_data` replaces the config's."""
        raise NotImplementedError

    def initialize(self, model: nn.Module, layers: Mapping[str, LoraLayer], adapter_name: str) -> None:
        """Set initial factors once the leaves are in place. Nothing to do for plain LoRA initialization."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields. `peft_type` is this method's own, so that nothing without this package mistakes the
        adapter for plain LoRA; where it is one (`is_plain`), these are LoRA's fields.
        """
        plain = copy.copy(self)
        for name in self.UNSAVED:
            setattr(plain, name, None)
        if isinstance(self.subspace, SafetySubspace):
            plain.subspace = FILE_NAME
        elif isinstance(self.subspace, os.PathLike):
            plain.subspace = os.fspath(self.subspace)
        result: dict[str, Any] = LoraConfig.to_dict(plain)
        if self.is_plain:
            theirs = {entry.name for entry in fields(LoraConfig)}
            result = {name: value for name, value in result.items() if name in theirs}
        else:
            result["peft_type"] = self.PEFT_KEY
        # full names: no regular expression ever has to be trusted on the way back
        if self._modules and (self._partial or not self.is_plain):
            result["target_modules"] = sorted(self._modules)
            result["rank_pattern"] = {name: r for name, (r, _) in self._modules.items() if r != self.r}
            result["alpha_pattern"] = {
                name: alpha for name, (_, alpha) in self._modules.items() if alpha != self.lora_alpha
            }
            result |= {"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
        return result

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write the subspace file (for the adapter's modules only), then `adapter_config.json` with its hash. Where
        the adapter is plain (`is_plain`), the config alone.
        """
        stored = isinstance(self.subspace, SafetySubspace) and not self.is_plain
        if stored:
            used = self.subspace.restricted(self._modules) if self._modules else self.subspace
            path = used.save(save_directory)
            self.safety_artifact = {
                "subspace": FILE_NAME,
                "files": {FILE_NAME: files.sha256(path)},
                "extra_tensors": [],
            }
        super().save_pretrained(save_directory, **kwargs)
        if stored:
            path = Path(save_directory, MANIFEST)
            config = files.read_json(path)
            sign(config)
            path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
