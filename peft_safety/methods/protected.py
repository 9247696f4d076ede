"""What all protected configs share: `LoraConfig` plus a subspace, refusal of what cannot be protected, and the way to
and from disk.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from peft_safety import files, scales, weights
from peft_safety.artifact import StoredAdapter, base_key, sign
from peft_safety.data import calibration_rows
from peft_safety.errors import ArtifactError, ConfigError, ProtectionError, UnsupportedLayerError
from peft_safety.layers import ProtectedLinear, check_leaf, rebase
from peft_safety.methods import reuse
from peft_safety.names import original, pin, walk
from peft_safety.plain_lora import ADAPTER_FILE, INITS, MANIFEST, NOT_PROTECTED, check_features, check_sizes, config_of
from peft_safety.projection import Side
from peft_safety.subspace import FILE_NAME, SafetySubspace


@dataclass
class ProtectedConfig(LoraConfig):
    """Base of the protected configs. Not meant to be used itself.

    Args:
        subspace: a `SafetySubspace`, a file, a directory, a Hub id, or `"auto"` to calibrate when the adapter is
            injected.
        safety_rank: protected directions per layer when `subspace="auto"`; otherwise set from the subspace.
        safety_artifact: written by `save_pretrained`; leave it alone.

    Raises:
        ConfigError: a LoRA feature that cannot be protected, or numbers out of range.
    """

    subspace: Any = field(
        default="auto", metadata={"help": "SafetySubspace, path, Hub id, or 'auto' to calibrate at injection."}
    )
    safety_rank: int = field(default=32, metadata={"help": "Protected directions per layer for subspace='auto'."})
    safety_artifact: dict[str, Any] | None = field(
        default=None, metadata={"help": "Hashes of the saved files; written by save_pretrained."}
    )

    PEFT_KEY: ClassVar[str] = ""
    UNSAVED: ClassVar[tuple[str, ...]] = ()  # data: what came of them is saved, they are not

    def __post_init__(self) -> None:
        where = type(self).__name__
        check_features(self, f"{where}(target_modules={self.target_modules!r})", NOT_PROTECTED, INITS)
        if self.bias != "none":
            raise ConfigError(
                f"{where}: bias={self.bias!r} trains base biases, which no projection constrains. Use bias='none'."
            )
        check_sizes(vars(self), where)
        if not isinstance(self.safety_rank, int) or self.safety_rank < 1:
            raise ConfigError(f"{where}: safety_rank={self.safety_rank!r}. Use an integer of at least 1.")
        super().__post_init__()
        self._stored: StoredAdapter | None = None
        self._origin: reuse.Origin | None = None  # of the adapter that was made from it
        self._mark: str | None = None
        self._injecting = False
        self._modules: dict[str, tuple[int, float]] = {}  # what injection found: rank and alpha by module

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
        from peft_safety.estimate.activations import estimate, tokenizer_of

        subspace = estimate(
            model, calibration_rows("salora"), tokenizer=tokenizer_of(model), rank=self.safety_rank, layers=layers
        )
        subspace.provenance["source"] = "peft_safety refusal pairs, calibration split"
        return subspace

    @property
    def unfinished(self) -> str | None:
        """What is still missing for the adapter to be what its config says, for a warning when it is saved."""
        return None

    def initialize(self, model: nn.Module, layers: Mapping[str, LoraLayer], adapter_name: str) -> None:
        """Set initial factors once the leaves are in place. Nothing to do for plain LoRA initialization."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields. `peft_type` is this method's own, so that nothing without this package mistakes the
        adapter for plain LoRA.
        """
        plain = copy.copy(self)
        for name in self.UNSAVED:
            setattr(plain, name, None)
        if isinstance(self.subspace, SafetySubspace):
            plain.subspace = FILE_NAME
        elif isinstance(self.subspace, os.PathLike):
            plain.subspace = os.fspath(self.subspace)
        result: dict[str, Any] = LoraConfig.to_dict(plain)
        result["peft_type"] = self.PEFT_KEY
        if self._modules:  # full names: no regular expression ever has to be trusted on the way back
            result["target_modules"] = sorted(self._modules)
            result["rank_pattern"] = {name: r for name, (r, _) in self._modules.items() if r != self.r}
            result["alpha_pattern"] = {
                name: alpha for name, (_, alpha) in self._modules.items() if alpha != self.lora_alpha
            }
            result |= {"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
        return result

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write the subspace file (for the adapter's modules only), then `adapter_config.json` with its hash."""
        if isinstance(self.subspace, SafetySubspace):
            used = self.subspace.restricted(self._modules) if self._modules else self.subspace
            path = used.save(save_directory)
            self.safety_artifact = {
                "subspace": FILE_NAME,
                "files": {FILE_NAME: files.sha256(path)},
                "extra_tensors": [],
            }
        super().save_pretrained(save_directory, **kwargs)
        if isinstance(self.subspace, SafetySubspace):
            path = Path(save_directory, MANIFEST)
            config = files.read_json(path)
            sign(config)
            path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")

    def take(self, stored: StoredAdapter) -> None:
        """Take over a checked directory: its subspace, and the modules that it has, with their ranks and alphas, in
        place of any pattern.
        """
        if stored.residual != self.residual:
            raise ArtifactError(
                f"{stored.directory}: its factors are of another init than {type(self).__name__} says. Save the "
                "adapter again."
            )
        self._stored = stored
        self.subspace = stored.subspace
        alphas: dict[str, float] = stored.config.get("alpha_pattern") or {}
        self._modules = {
            name: (rank, alphas.get(name, stored.config["lora_alpha"])) for name, (_, _, rank) in stored.shapes.items()
        }
        pin(self, self._modules)
        mapping: Any = getattr(self, "auto_mapping", None)
        if not isinstance(mapping, dict) or not str(mapping.get("parent_library")).startswith("transformers."):
            self.auto_mapping = None  # AutoPeftModel would import whatever it names


def public_name(label: str) -> str:
    """A Hub id or an adapter's name as it is; of a local path only the last part."""
    return os.path.basename(os.path.normpath(label)) if os.path.isabs(label) or os.path.exists(label) else label


def adapter_layers(model: nn.Module, adapter_name: str) -> dict[str, LoraLayer]:
    """PEFT's LoRA layers that hold this adapter, by the module's name in the base model.

    Raises:
        UnsupportedLayerError: one of them cannot be protected.
    """
    found = {}
    for name, _, module in walk(model):
        layer = next(
            (
                part
                for part in _stacked(module)
                if adapter_name in part.lora_A or adapter_name in part.lora_embedding_A
            ),
            None,
        )
        if layer is None:
            continue
        base = layer.get_base_layer()
        usual = type(layer).__name__ in ("Linear", "Linear4bit", "Linear8bitLt") and weights.supported(base)
        if usual or scales.is_packed(base):
            weights.check_readable(base, name)
        if not usual or getattr(base, "_hf_tp_plan", None) is not None:
            raise UnsupportedLayerError(
                f"{name}: a {type(base).__name__} under {type(layer).__name__} cannot be protected (only Linear, "
                "Conv1D and bitsandbytes "
                "4-bit or 8-bit layers, not split by tensor parallelism). Leave it out of target_modules."
            )
        found[name] = layer
    return found


def _stacked(module: nn.Module | None) -> Iterator[LoraLayer]:
    """The LoRA layers in one place of a model: a mixed model has adapters of other kinds around them."""
    while isinstance(module, BaseTunerLayer):
        if isinstance(module, LoraLayer):
            yield module
        module = getattr(module, "base_layer", None)


def check_ahead(model: nn.Module, config: ProtectedConfig) -> None:
    """Before anything is allocated: does a stored adapter fit this model, and is the rank one that some layer can
    have?

    Raises:
        ArtifactError: a module that the model lacks, or one of another shape; a tensor that would replace a base
            weight.
        ConfigError: a rank above every layer's width.
    """
    modules = {name: original(module) for name, _, module in walk(model)}
    if config._stored is None:
        widest = max((min(weights.shape(m)) for m in modules.values() if weights.supported(m)), default=config.r)
        if config.r > widest:
            raise ConfigError(
                f"{type(config).__name__}: r={config.r}, but no linear layer of the model is wider than {widest}. Use "
                "a smaller r."
            )
        return
    for name, (m, n, rank) in config._stored.shapes.items():
        base = modules.get(name)
        if base is None or not weights.supported(base) or weights.shape(base) != (m, n):
            found = (
                "no such module"
                if base is None
                else f"a {type(base).__name__}" + (f" {weights.shape(base)}" if weights.supported(base) else "")
            )
            raise ArtifactError(
                f"{config._stored.directory}: the adapter has {name} ({m} x {n}, rank {rank}), the model has {found}. "
                "Load the base model that it was trained on."
            )
    _check_extra(model, config, config._stored)


def _check_extra(model: nn.Module, config: ProtectedConfig, stored: StoredAdapter) -> None:
    """Tensors that are no factors are exactly those of `modules_to_save`, or token rows, or the model's own
    embeddings: nothing else is replaced.
    """
    saved = tuple(config.modules_to_save or ())
    if not saved and not stored.extra_tensors:
        return
    places = {name: module for name, _, module in walk(model, shared=True)}
    inside = tuple(f"{name}." for name, module in places.items() if isinstance(module, AuxiliaryTrainingWrapper))
    modules = {name: original(module) for name, module in places.items() if not name.startswith(inside)}
    ends = [getattr(model, f"get_{kind}_embeddings", lambda: None)() for kind in ("input", "output")]
    ends = [original(end) for end in ends if end is not None]
    allowed = {
        f"{n}.{k}": tuple(v.shape)
        for n, m in modules.items()
        if saved and n.endswith(saved)
        for k, v in m.state_dict().items()
    }
    needed = set(allowed)
    for name, module in modules.items():
        if any(module is end for end in ends):
            allowed |= {f"{name}.{k}": tuple(v.shape) for k, v in module.state_dict().items()}
    with files.open_tensors(stored.directory / ADAPTER_FILE) as handle:
        found = {
            base_key(key, stored.shapes): tuple(handle.get_slice(key).get_shape()) for key in stored.extra_tensors
        }
    if config.trainable_token_indices:
        found = {key: shape for key, shape in found.items() if "token_adapter" not in key}
    odd = sorted(key for key in found.keys() | needed if found.get(key) != allowed.get(key))
    if odd:
        raise ArtifactError(
            f"{stored.directory}: {odd[0]} is {found.get(odd[0], 'missing')} in the adapter, and modules_to_save and "
            "the model's embeddings account for "
            f"{allowed.get(odd[0], 'no such tensor')}: it would replace a base weight, or leave one untrained. Save "
            "the adapter again."
        )


def bind(layers: Mapping[str, LoraLayer], adapter_name: str, config: ProtectedConfig) -> None:
    """Put leaves with the config's bases in place of the factors, or give the leaves that are there those bases."""
    there: dict[ProtectedLinear, Tensor | None] = {}
    for name, layer in layers.items():
        for factor, side, basis in _sides(layer, config, name):
            old = factor[adapter_name]
            if isinstance(old, ProtectedLinear):
                there[old] = basis
            else:
                factor[adapter_name] = ProtectedLinear.replacing(old, basis, side, residual=config.residual)
    rebase(there)
    for name, layer in layers.items():
        for factor, _, _ in _sides(layer, config, name):
            factor[adapter_name].fold()


def _sides(layer: LoraLayer, config: ProtectedConfig, name: str) -> Iterator[tuple[Any, Side, Tensor | None]]:
    """The factors of a layer where a leaf belongs, each with its side and its basis: the constrained one, and with a
    residual the other one too.
    """
    pairs: tuple[tuple[Any, Side], ...] = ((layer.lora_A, "in"), (layer.lora_B, "out"))
    for factor, side in pairs:
        if side in config.sides:
            yield factor, side, config.subspace.bases[name][side]
        elif config.residual:
            yield factor, side, None


def config_table(model: nn.Module) -> dict[str, Any]:
    """PEFT's configs by adapter name: of a PeftModel, a transformers model with adapters, or a wrapper around one.
    Empty without adapters.
    """
    tables = (getattr(module, "peft_config", None) for module in model.modules())
    return next((table for table in tables if isinstance(table, dict)), {})


def protected_configs(model: nn.Module) -> dict[str, ProtectedConfig]:
    """The protected ones among the adapters of a model, by adapter name."""
    return {name: config for name, config in config_table(model).items() if isinstance(config, ProtectedConfig)}


def assert_protected(model: nn.Module, adapter_name: str | None = None) -> None:
    """Check that every protected adapter still is: leaf, basis and weight of each of its modules.

    Args:
        adapter_name: one adapter; None checks all protected ones.

    Raises:
        ProtectionError: no protected adapter is there, or one has lost its protection; names the module.
    """
    configs = protected_configs(model)
    if adapter_name is not None:
        configs = {name: config for name, config in configs.items() if name == adapter_name}
    if not configs:
        raise ProtectionError(
            f"the model has no protected adapter{'' if adapter_name is None else f' {adapter_name!r}'}. Use "
            "SaLoRAConfig instead of LoraConfig."
        )
    for name, config in configs.items():
        layers = adapter_layers(model, name)
        if set(layers) != set(config._modules):
            raise ProtectionError(
                f"adapter {name!r}: modules {sorted(set(layers) ^ set(config._modules))[:3]} came or went since "
                "injection. Load the adapter again."
            )
        for module, layer in layers.items():
            for factor, side, basis in _sides(layer, config, module):
                check_leaf(factor[name], f"{module} (adapter {name!r})", basis, side, config.residual)


def stored_config(stored: StoredAdapter) -> ProtectedConfig:
    """The config of a checked directory, as loading would make it.

    Raises:
        PeftSafetyError: a field that the method cannot honor, or that is not of this config's types.
    """
    config: ProtectedConfig = config_of(stored.config, stored.directory / MANIFEST)
    config.take(stored)
    return config
