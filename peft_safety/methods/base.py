"""The base of all protected configs: `LoraConfig` plus a subspace, without the features that cannot be protected."""

from __future__ import annotations

import copy
import json
import os
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING, Any, ClassVar

from peft import LoraConfig
from torch import nn

from peft_safety.calibration.activations import estimate
from peft_safety.calibration.estimators import SafetySubspace
from peft_safety.calibration.models import tokenizer_for
from peft_safety.calibration.prepare import MAX_LENGTH
from peft_safety.calibration.sizes import check_size_options
from peft_safety.core import files
from peft_safety.core.adapter_dir import StoredAdapter, sign
from peft_safety.core.certificate import Certificate
from peft_safety.core.features import INITS, NOT_PROTECTED, WITH_FROZEN_A, WITH_PROJECTION, check_features, check_sizes
from peft_safety.core.names import pattern_value
from peft_safety.core.parameters import stored_name
from peft_safety.core.plain_lora import MANIFEST
from peft_safety.core.projection import Side
from peft_safety.core.snapshot import Snapshot
from peft_safety.core.subspace_file import FILE_NAME
from peft_safety.core.targets import target_layers
from peft_safety.data import calibration_rows
from peft_safety.data.rows import Rows, data_rows
from peft_safety.errors import ConfigError

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer
    from torch import Tensor

Layers = Mapping[str, nn.Module]
LAYER_BUILDERS: set[CodeType] = set()
"""The functions in which PEFT's layers make their factors from a config. `registry` fills this set."""


def option(default: Any, text: str) -> Any:
    """A field of a config with its help text."""
    return field(default=default, metadata={"help": text})


@dataclass
class ProtectedConfig(LoraConfig):
    """Base of the protected configs, not used by itself.

    Args:
        subspace: a `SafetySubspace`, file, directory, Hub id, or `"auto"`: calibrate when the adapter is injected. A
            config makes any number of adapters and is not written to: what was calibrated is
            `model.peft_config["default"].subspace`.
        safety_rank: size of the subspace of `"auto"` (a given one has its own): directions per module, an integer, or
            a share of its features, a float in (0, 1). None takes the method's default. For the inputs of an embedding
            all tokens of the data are taken instead.
        safety_energy: as many directions as hold this share of the energy; at most `safety_rank`, if that is given.
        safety_rank_pattern: other values by the end of a module's name, `{"down_proj": 0.1}`: of the energy where one
            is given, else of the rank.
        fused: whether layers on NF4 weights take the fused path where they can; None leaves it to PEFT_SAFETY_FUSED.
            Not saved.
        safety_artifact: written by `save_pretrained`; leave it alone.

    Raises:
        ConfigError: a LoRA feature that cannot be protected, or numbers out of range.
    """

    subspace: Any = option("auto", "SafetySubspace, path, Hub id, or 'auto' to calibrate at injection.")
    safety_rank: int | float | None = option(None, "For 'auto': directions per module, or a share of its features.")
    safety_energy: float | None = option(None, "As many as hold this share of the energy; at most safety_rank.")
    safety_rank_pattern: dict[str, int | float] | None = option(None, "Other values, by the end of a module's name.")
    fused: bool | None = option(None, "Fused operations on NF4 weights; None: PEFT_SAFETY_FUSED. Not saved.")
    safety_artifact: dict[str, Any] | None = option(None, "Hashes of the saved files; written by save_pretrained.")

    PEFT_KEY: ClassVar[str] = ""
    UNSAVED: ClassVar[tuple[str, ...]] = ()  # data fields: only what was computed from them is saved
    LEAST_RANK: ClassVar[int] = 1

    def __post_init__(self) -> None:
        where = type(self).__name__
        what = f"{where}(target_modules={self.target_modules!r})"
        given: Any = self
        if self.freezes and getattr(given, "velora_config", None) is not None:
            given.velora_config = None
            warnings.warn(
                f"{where}: VeLoRA compresses the inputs that the gradient of lora_A needs. A frozen one needs none, "
                "so velora_config is left out: outputs and the gradient of lora_B are the same.",
                stacklevel=4,
            )
        check_features(self, what, NOT_PROTECTED, INITS, WITH_FROZEN_A if self.freezes else WITH_PROJECTION)
        if self.fused not in (None, True, False):
            raise ConfigError(f"{where}: fused={self.fused!r}. Use True, False or None.")
        if self.bias != "none":
            raise ConfigError(f"{where}: bias={self.bias!r} trains what no projection constrains. Use bias='none'.")
        check_sizes(vars(self), where)
        check_size_options(
            self.safety_rank, self.safety_energy, self.safety_rank_pattern, where, least=self.LEAST_RANK
        )
        super().__post_init__()
        self._stored: StoredAdapter | None = None
        self._snapshot: Snapshot | None = None  # of the directory that it was read from, until an adapter is made
        self._origin: Any = None  # `registry.reuse.Origin` of the adapter that was made from it
        self._mark: str | None = None
        self._injecting = False
        self._combined = False  # PEFT fills its factors with a combination of other adapters
        self._partial = False  # layers that the target patterns match were left out
        self._modules: dict[str, tuple[int, float]] = {}  # what injection found: rank and alpha by module
        self._parameters: dict[str, str] = {}  # and where PEFT adapts a single parameter, its name
        self._certificate: Certificate | None = None  # of an adapter whose lora_A is frozen

    @property
    def use_rslora(self) -> bool:
        """LoRA's field. Every LoRA layer reads it when it is made; one made outside the injection is refused here."""
        if sys._getframe(1).f_code in LAYER_BUILDERS and not self._injecting:
            remedy = "Use get_peft_model, add_adapter or inject_adapter_in_model."
            raise ConfigError(f"{type(self).__name__}: a layer built by itself would not be protected. {remedy}")
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
        """Sides of the update that are constrained to the complement of their basis."""
        return self.basis_sides

    @property
    def a_side(self) -> Side:
        """The kind of constraint that `lora_A` has, if it has one."""
        return "window" if "window" in self.sides else "in"

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
        """Digest of the bases that constrain the adapter, which are those of its modules."""
        if self._certificate is not None:
            return self._certificate.subspace
        digest: str = (self.subspace.restricted(self._modules) if self._modules else self.subspace).digest
        return digest

    @property
    def subspace_size(self) -> dict[str, Any]:
        """The requested size, as arguments of `estimate` and `estimate_from_weights`."""
        return {"rank": self.safety_rank, "energy": self.safety_energy, "per_kind": self.safety_rank_pattern}

    def resolve(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> SafetySubspace:
        """The subspace: as given, loaded, or calibrated on the package's own data. `layers`: base layers by name."""
        if isinstance(self.subspace, SafetySubspace):
            return self.subspace
        if self.subspace == "auto":
            return self.calibrate(model, layers)
        if isinstance(self.subspace, (str, os.PathLike)):
            return SafetySubspace.load(self.subspace, modules=layers)
        kind = type(self.subspace).__name__
        raise ConfigError(f"subspace is a {kind}. Give a SafetySubspace, a path, a Hub id, or 'auto'.")

    @property
    def calibration(self) -> dict[str, Any]:
        """The arguments of `estimate` that the method sets, and the `basis` of `calibration_rows`."""
        return {"method": "salora", "basis": "harmful"}

    def calibrate(
        self, model: nn.Module, layers: Layers, data: Any = None, tokenizer: Any = None, **options: Any
    ) -> SafetySubspace:
        """The function `calibrate` for base layers by name. `options`: `memory`, `seed`, `progress`, `max_length`."""
        how = self.calibration
        method, basis = how["method"], how.pop("basis")
        rows = calibration_rows(method, basis) if data is None else data_rows(data, "data")
        options |= {"tokenizer": tokenizer or tokenizer_for(model, rows), "layers": layers, "allow_fewer": True}
        subspace = estimate(model, rows, **how, **self.subspace_size, **options)
        if data is None:
            subspace.provenance["source"] = f"peft_safety's own rows, basis {basis!r}"
        return subspace

    @property
    def unconstrained(self) -> str:
        """What trains beside the update without any constraint, in words; empty if nothing does."""
        rows: Any = self.trainable_token_indices or {}
        table = rows if isinstance(rows, dict) else {"the input embedding": rows}
        named = [f"{len(indices)} rows of {name}" for name, indices in table.items()]
        return ", ".join([*(self.modules_to_save or ()), *named])

    @property
    def unfinished(self) -> str | None:
        """Why the adapter is not yet what its config says, for a warning when it is saved."""
        return None

    def frozen_rows(
        self, model: nn.Module, layers: Mapping[str, LoraLayer], adapter_name: str, task_data: Any = None
    ) -> dict[str, Tensor]:
        """`A (r, n)`, fp32, of every layer, for a method that `freezes`. `task_data` replaces the config's."""
        raise NotImplementedError

    def initialize(self, model: nn.Module, layers: Mapping[str, LoraLayer], adapter_name: str) -> None:
        """Set initial factors once the leaves are in place. Nothing to do for plain LoRA initialization."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields, under the method's own `peft_type`; where the adapter is a plain LoRA, LoRA's fields."""
        plain = copy.copy(self)
        for name in self.UNSAVED:
            setattr(plain, name, None)
        if isinstance(self.subspace, SafetySubspace):
            plain.subspace = FILE_NAME
        elif isinstance(self.subspace, os.PathLike):
            plain.subspace = os.fspath(self.subspace)
        result: dict[str, Any] = LoraConfig.to_dict(plain)
        result.pop("fused", None)  # a choice for this machine
        if self.is_plain:
            result = {entry.name: result[entry.name] for entry in fields(LoraConfig) if entry.name in result}
        else:
            result["peft_type"] = self.PEFT_KEY
        keys = {stored_name(name, self._parameters.get(name)): name for name in self._modules}
        # full names: nobody who loads it has to run a regular expression from a file
        if self._modules and (self._partial or not self.is_plain or not self._says(keys)):
            parameters = {stored_name(name, part) for name, part in self._parameters.items()}
            result["target_modules"] = sorted(set(keys) - parameters)
            if parameters:
                result["target_parameters"] = sorted(parameters)
            sizes = {key: self._modules[name] for key, name in keys.items()}
            result["rank_pattern"] = {key: r for key, (r, _) in sizes.items() if r != self.r}
            result["alpha_pattern"] = {key: alpha for key, (_, alpha) in sizes.items() if alpha != self.lora_alpha}
            result |= {"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
        return result

    def _says(self, keys: Mapping[str, str]) -> bool:
        """Whether the patterns, without running any, say the rank and alpha of each module. `keys`: stored names."""
        tables = (self.rank_pattern, self.r), (self.alpha_pattern, self.lora_alpha)
        return all(
            tuple(pattern_value(table, key, usual) for table, usual in tables) == self._modules[name]
            for key, name in keys.items()
        )

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write the subspace of the adapter's modules, or its certificate, and the config with its hashes."""
        stored = isinstance(self.subspace, SafetySubspace) and not self.is_plain
        if stored:
            used = self.subspace.restricted(self._modules) if self._modules else self.subspace
            path = used.save(save_directory)
            hashes = {FILE_NAME: files.sha256(path)}
            self.safety_artifact = {"subspace": FILE_NAME, "files": hashes, "extra_tensors": []}
        super().save_pretrained(save_directory, **kwargs)
        if self.is_plain and self._certificate is not None:
            self._certificate.write(Path(save_directory))
        if stored:
            path = Path(save_directory, MANIFEST)
            config = files.read_json(path, files.MAX_LISTING_BYTES)
            sign(config)
            path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def calibrate(
    model: nn.Module,
    config: ProtectedConfig,
    data: Rows | None = None,
    *,
    tokenizer: Any = None,
    memory: str | int | None = None,
    seed: int = 0,
    progress: bool = True,
    max_length: int = MAX_LENGTH,
) -> SafetySubspace:
    """Estimate the subspace of a config before its adapter is injected, as `subspace="auto"` does at injection:
    `config.subspace = calibrate(model, config)`.

    Layers that no token reaches, or too narrow for a basis, are in `SafetySubspace.left_out`; the adapter leaves them
    out, with a warning.

    Args:
        model: the base model, dense or quantized; adapters on it are switched off meanwhile.
        config: says the method, the sizes, and the target and excluded modules.
        data: rows or tokenized batches, as in `SafetySubspace.from_activations`; default the package's own.
        tokenizer: for rows; default the one under the model's own name.
        memory: budget for the second moments, in bytes or as "4GB"; default half of the device's free memory.
        seed: of the decompositions.
        progress: show a bar.
        max_length: tokens of each row that are read; a row whose answer lies past them is left out, with a warning.

    Returns:
        The subspace: bases `(features, k)` of each module and side.

    Raises:
        ConfigError: a config without a subspace; data for a basis of weights; no target module; no tokenizer.
        CalibrationError: data that reach no layer, or that hold fewer tokens than directions.
    """
    if not isinstance(config, ProtectedConfig):
        raise ConfigError(f"a {type(config).__name__} has no safety subspace. Use GuardSpaceConfig or SaLoRAConfig.")
    packed = "out" not in config.basis_sides
    wanted = config.target_modules, config.exclude_modules
    layers = target_layers(model, *wanted, target_parameters=config.target_parameters, packed=packed)
    options: dict[str, Any] = {"memory": memory, "seed": seed, "progress": progress, "max_length": max_length}
    return config.calibrate(model, layers, data, tokenizer, **options)
