"""The package's place in PEFT: the only file that touches PEFT's internals.

A protected config keeps `peft_type == LORA` at run time, so that every gate in peft, transformers and trl stays open, and is stored under its own name, which
PEFT resolves through its config mapping. Ten PEFT functions are wrapped, each by a few lines below; `SYMBOLS` names everything that is relied on, and a
canary test checks all of it against the installed PEFT.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from peft_safety import weights
from peft_safety.errors import ArtifactError, ConfigError, LossyMergeError, PeftSafetyError

SYMBOLS = {
    "peft.mapping": ("PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_TUNER_MAPPING", "PEFT_TYPE_TO_PREFIX_MAPPING", "PEFT_TYPE_TO_MIXED_MODEL_MAPPING"),
    "peft.config": ("PeftConfigMixin.from_pretrained", "PeftConfigMixin.from_json_file"),
    "peft.peft_model": ("PeftModel.save_pretrained", "PeftModel.load_adapter"),
    "peft.tuners.lora": ("LoraModel._check_add_weighted_adapter", "LoraLayer.lora_A", "LoraLayer.lora_B"),
    "peft.tuners.tuners_utils": (
        "BaseTuner._unload_and_optionally_merge",
        "BaseTuner.merge_adapter",
        "BaseTuner.inject_adapter",
        "BaseTunerLayer.get_base_layer",
        "BaseTunerLayer.enable_adapters",
        "BaseTunerLayer.delete_adapter",
    ),
    "peft.tuners.lora.layer": ("Linear.get_delta_weight",),
    "peft.utils.hotswap": ("_get_padded_linear", "hotswap_adapter_from_state_dict"),
}
"""Every PEFT symbol that is read or wrapped, by module. Instance attributes (`LoraLayer.lora_A`) are checked on an instance."""

QUANTISED = {"peft.tuners.lora.bnb": ("Linear4bit.get_delta_weight", "Linear8bitLt.get_delta_weight")}
"""The same, where bitsandbytes is installed."""

_done = False


def config_types() -> dict[str, type]:
    """Stored name -> config class. A new method adds one line."""
    from peft_safety.methods.salora import SaLoRAConfig

    return {"SALORA": SaLoRAConfig}


def register() -> None:
    """Make PEFT know the protected types. Called once, when `peft_safety` and `peft` are both imported; calling it again does nothing."""
    global _done  # noqa: PLW0603
    if _done:
        return
    _done = True
    import peft.peft_model
    import peft.tuners.lora
    from peft import mapping
    from peft.config import PeftConfigMixin
    from peft.utils import hotswap

    tables = (
        mapping.PEFT_TYPE_TO_CONFIG_MAPPING,
        mapping.PEFT_TYPE_TO_TUNER_MAPPING,
        mapping.PEFT_TYPE_TO_PREFIX_MAPPING,
        mapping.PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    )
    for name, cls in config_types().items():
        values: tuple[Any, ...] = (cls, peft.tuners.lora.LoraModel, "lora_", peft.tuners.lora.LoraModel)
        for table, value in zip(tables, values, strict=True):
            table[name] = value

    _wrap(PeftConfigMixin, "from_json_file", _from_json_file)
    _wrap(PeftConfigMixin, "from_pretrained", _config_from_pretrained)
    _wrap(peft.peft_model.PeftModel, "save_pretrained", _save_pretrained)
    _wrap(peft.peft_model.PeftModel, "load_adapter", _load_adapter)
    _wrap(peft.tuners.lora.LoraModel, "inject_adapter", _inject_adapter)
    _wrap(peft.tuners.lora.LoraModel, "merge_adapter", _merge_adapter)
    _wrap(peft.tuners.lora.LoraModel, "_unload_and_optionally_merge", _unload_and_optionally_merge)
    _wrap(peft.tuners.lora.LoraModel, "_check_add_weighted_adapter", _check_add_weighted_adapter)
    _wrap(hotswap, "_get_padded_linear", _get_padded_linear)
    _wrap(hotswap, "hotswap_adapter_from_state_dict", _hotswap_adapter_from_state_dict)
    layers = [peft.tuners.lora.Linear] + [getattr(peft.tuners.lora, n) for n in ("Linear4bit", "Linear8bitLt") if hasattr(peft.tuners.lora, n)]
    for layer in layers:
        _wrap(layer, "get_delta_weight", _get_delta_weight)


def _wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Replace `owner.name` by `wrapper(original, *args, **kwargs)`, keeping its signature and its being a class method."""
    found = getattr(owner, name)
    inner = getattr(found, "__func__", found) if isinstance(owner, type) else found

    @functools.wraps(inner)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(inner, *args, **kwargs)

    setattr(owner, name, classmethod(wrapped) if isinstance(owner, type) and hasattr(found, "__self__") else wrapped)


# --- injection -------------------------------------------------------------------------------------------------------------------------------------------


def _inject_adapter(original: Callable[..., None], self: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
    """PEFT builds its layers, then the protected leaves go in. If anything fails, the model is put back as it was."""
    from peft_safety.methods.protected import ProtectedConfig, attach, check_ahead

    config = self.peft_config[adapter_name]
    if not isinstance(config, ProtectedConfig):
        return original(self, model, adapter_name, *args, **kwargs)
    check_ahead(model, config)
    modules = dict(model.named_modules())
    parameters = [(module, dict(module._parameters)) for module in modules.values()]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        original(self, model, adapter_name, *args, **kwargs)
        attach(model, adapter_name, config)
    except BaseException as error:
        _undo(model, adapter_name, modules)
        for module, own in parameters:  # PEFT's MultiheadAttention registers its base weights anew
            module._parameters.clear()
            module._parameters.update(own)
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)
        if isinstance(error, ValueError) and not isinstance(error, PeftSafetyError):  # PEFT's own, such as no module matched
            raise ConfigError(f"{type(config).__name__}: {error} Give target_modules that the model has, or 'all-linear'.") from error
        raise
    return None


def _undo(model: nn.Module, adapter_name: str, before: dict[str, nn.Module]) -> None:
    """Take a half-made adapter out again: modules that were replaced come back, layers that were there before lose the adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in before.items():
        if isinstance(module, BaseTunerLayer):
            module.delete_adapter(adapter_name)
        parent, _, child = name.rpartition(".")
        if name and parent in before and getattr(before[parent], child, None) is not module:
            setattr(before[parent], child, module)
    table = getattr(model, "peft_config", None)
    if isinstance(table, dict):
        table.pop(adapter_name, None)
    if not table:  # transformers marks the model before it injects
        vars(model).pop("_hf_peft_config_loaded", None)


# --- the artifact ----------------------------------------------------------------------------------------------------------------------------------------


def _from_json_file(original: Callable[..., Any], cls: Any, path_json_file: str, **kwargs: Any) -> Any:
    """A config of this package is parsed with limits before PEFT sees it, and refused where it hides what it is; any other is PEFT's business."""
    from peft_safety import files
    from peft_safety.artifact import check_config
    from peft_safety.subspace import FILE_NAME

    path = Path(path_json_file)
    files.recover(path.parent, path.name)
    with path.open("rb") as file:
        raw = file.read(files.MAX_JSON_BYTES + 1)
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):
        found = None  # truncated, too long or not JSON: ours if anything says so
    fields = found if isinstance(found, dict) else {}
    kind = fields.get("peft_type")
    ours = isinstance(kind, str) and kind in config_types()
    unreadable = not isinstance(kind, str) and ((path.parent / FILE_NAME).exists() or any(name.encode() in raw for name in config_types()))
    if ours or unreadable:
        files.read_json(path)
    if unreadable or (not ours and fields.get("safety_artifact") is not None):
        raise ArtifactError(
            f"{path}: peft_type {kind!r} would load a protected adapter without its protection. Copy or save the adapter again; to make it a plain LoRA on "
            "purpose, use peft_safety.export_lora."
        )
    if ours and fields.get("safety_artifact") is not None:
        check_config(fields, str(path))
    return original(cls, path_json_file, **kwargs)


def _config_from_pretrained(original: Callable[..., Any], cls: Any, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
    """A protected config comes with its checked directory: whatever loads it next finds subspace, shapes and full module names."""
    from peft_safety.artifact import check_adapter
    from peft_safety.methods.protected import ProtectedConfig

    source = pretrained_model_name_or_path  # PEFT's own name above: callers may use it
    try:
        config = original(cls, source, subfolder, **kwargs)
    except (TypeError, ValueError) as error:
        if isinstance(error, PeftSafetyError) or not issubclass(cls, ProtectedConfig):
            raise
        raise ArtifactError(f"{source!r}: its adapter_config.json is not a {cls.__name__}: {error}. Save the adapter again.") from error
    if not isinstance(config, ProtectedConfig):
        return config
    local = Path(source, subfolder) if subfolder else Path(source)
    if config.safety_artifact is None and local.is_dir() and not any(local.glob("adapter_model*")):
        return config  # a config alone, saved before any adapter was made from it
    config.take(check_adapter(_directory(source, subfolder, kwargs)))
    return config


def _directory(source: str | os.PathLike[str], subfolder: str | None, kwargs: dict[str, Any]) -> Path:
    """The directory of an adapter; from the Hub, its three files are fetched (or found in the cache) first."""
    local = Path(source, subfolder) if subfolder else Path(source)
    if local.is_dir():
        return local
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    from peft_safety.artifact import ADAPTER_FILE, MANIFEST
    from peft_safety.subspace import FILE_NAME

    options = {k: v for k, v in kwargs.items() if k in ("revision", "token", "cache_dir", "force_download", "local_files_only", "proxies", "etag_timeout")}
    try:
        paths = [Path(hf_hub_download(str(source), name, subfolder=subfolder, **options)) for name in (ADAPTER_FILE, FILE_NAME, MANIFEST)]
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ArtifactError(
            f"{source!r}: a protected adapter needs {ADAPTER_FILE}, {FILE_NAME} and {MANIFEST}; one cannot be fetched ({type(error).__name__})."
        ) from error
    return paths[-1].parent


def _save_pretrained(original: Callable[..., None], self: Any, save_directory: str, *args: Any, **kwargs: Any) -> None:
    """Save into a staging folder, complete and check what is there, publish it in one step. Adapters that are not protected come along."""
    from peft_safety.artifact import MANIFEST, check_adapter, seal
    from peft_safety.files import publishing
    from peft_safety.methods.protected import assert_protected, protected_configs

    given = inspect.signature(original).bind(self, save_directory, *args, **kwargs).arguments  # by name, however the caller passed them
    selected = given.get("selected_adapters") or list(self.peft_config)
    protected = [name for name in protected_configs(self) if name in selected]
    if not protected or not given.get("is_main_process", True):
        return original(self, save_directory, *args, **kwargs)
    if not given.get("safe_serialization", True):
        raise ConfigError("safe_serialization=False writes pickles, which this package never reads. Save as safetensors.")
    if given.get("path_initial_model_for_weight_conversion") is not None:
        raise ConfigError("path_initial_model_for_weight_conversion is for inits that rewrite the base weight. Use peft_safety.export_lora.")
    for name in protected:
        assert_protected(self, name)
    if Path(save_directory).is_file():
        raise ArtifactError(f"{save_directory} is a file. Give a directory.")
    with publishing(Path(save_directory), MANIFEST) as staging:
        if (card := Path(save_directory, "README.md")).is_file():
            shutil.copy(card, staging)  # PEFT adds to a model card that is there
        original(self, str(staging), *args, **kwargs)
        for name in protected:
            folder = staging if name == "default" else staging / name
            seal(folder)
            check_adapter(folder)
    return None


def _load_adapter(original: Callable[..., Any], self: Any, model_id: str, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
    """Loading onto an adapter that is there (a resumed run): check the directory first, and bring its bases along."""
    from peft import PeftConfig

    from peft_safety.methods.protected import ProtectedConfig, adapter_layers, bind, check_ahead

    config = self.peft_config.get(adapter_name)
    fresh = isinstance(config, ProtectedConfig) and config._stored is not None and config._stored.comes_from(str(model_id), kwargs.get("subfolder"))
    if not isinstance(config, ProtectedConfig) or fresh:
        result = original(self, model_id, adapter_name, *args, **kwargs)
        config = self.peft_config.get(adapter_name)
        if isinstance(config, ProtectedConfig):
            config._stored = None
        return result
    options = {k: v for k, v in kwargs.items() if k in ("subfolder", "revision", "token", "cache_dir")}
    stored = PeftConfig.from_pretrained(str(model_id), **options)
    if type(stored) is not type(config):
        raise ConfigError(
            f"adapter {adapter_name!r} is protected ({type(config).__name__}), {model_id} holds a {type(stored).__name__}. Load it under a new name."
        )
    if stored._stored is None:
        raise ArtifactError(f"{model_id} holds a config without an adapter. Give a directory that save_pretrained wrote.")
    check_ahead(self, stored)
    layers = adapter_layers(self, adapter_name)
    _check_same(adapter_name, str(model_id), stored, config, layers)
    stored.subspace.check_fits({name: layer.get_base_layer() for name, layer in layers.items()}, config.SIDE)
    config.subspace = stored.subspace
    bind(layers, adapter_name, config)
    return original(self, model_id, adapter_name, *args, **kwargs)


def _check_same(adapter_name: str, source: str, stored: Any, config: Any, layers: Any) -> None:
    found = {name: rank for name, (_, _, rank) in stored._stored.shapes.items()}
    here = {name: int(layer.r[adapter_name]) for name, layer in layers.items()}
    if found != here or stored._stored.residual != config.residual:
        odd = sorted(set(found.items()) ^ set(here.items()))[:3]
        raise ArtifactError(f"{source}: its modules, ranks or init are not those of adapter {adapter_name!r}; they differ at {odd}. Load it under a new name.")


# --- merge, combine, hot-swap ----------------------------------------------------------------------------------------------------------------------------


def _get_delta_weight(original: Callable[..., Any], self: Any, adapter: str, *args: Any, **kwargs: Any) -> Any:
    """What is merged or converted: `s (C B A - C B0 A0)` where a residual exists, PEFT's `s B A` (B already folded) elsewhere."""
    from peft.utils.other import transpose

    delta = original(self, adapter, *args, **kwargs)
    frozen_a, frozen_b = getattr(self.lora_A[adapter], "initial", None), getattr(self.lora_B[adapter], "initial", None)
    if frozen_a is None or frozen_b is None:
        return delta
    frozen = transpose(frozen_b.float() @ frozen_a.float(), getattr(self, "fan_in_fan_out", False)) * self.scaling[adapter]
    return (delta.float() - frozen).to(delta.dtype)


def _merge_adapter(original: Callable[..., None], self: Any, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
    _refuse_lossy_merge(self, adapter_names)
    original(self, adapter_names, safe_merge)


def _unload_and_optionally_merge(
    original: Callable[..., Any], self: Any, merge: bool = True, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
) -> Any:
    if merge:
        _refuse_lossy_merge(self, adapter_names)
    return original(self, merge, progressbar, safe_merge, adapter_names)


def _refuse_lossy_merge(model: Any, adapter_names: list[str] | None) -> None:
    """Merging a protected update into a k-bit weight rounds most of it away, and what is left leaks: refuse, with the figure, before anything is merged."""
    from peft_safety.methods.protected import adapter_layers, protected_configs

    for adapter in protected_configs(model):
        for name, layer in adapter_layers(model, adapter).items():
            base = layer.get_base_layer()
            kind = weights.quantisation(base)
            if kind is not None and adapter in (adapter_names or layer.active_adapters):
                kept = weights.merge_survival(base, layer.get_delta_weight(adapter), name)
                raise LossyMergeError(
                    f"{name}: merging into a {kind} weight would keep {kept:.1%} of the update of adapter {adapter!r} and let the rest leak into the protected "
                    "subspace. Keep the adapter beside the base, or merge into dequantised weights with peft_safety.merge_dequantised(model)."
                )


def _check_add_weighted_adapter(original: Callable[..., Any], self: Any, adapters: list[str], *args: Any, **kwargs: Any) -> Any:
    """A combination is constrained by one subspace: refuse to mix subspaces, plain LoRA and residuals."""
    from peft_safety.methods.protected import ProtectedConfig

    configs = {name: self.peft_config[name] for name in adapters if name in self.peft_config}
    protected = {name: config for name, config in configs.items() if isinstance(config, ProtectedConfig)}
    if protected:
        digests = {config.subspace.digest for config in protected.values()}
        if len(protected) < len(configs) or len(digests) > 1:
            raise ConfigError(f"adapters {adapters} do not share one safety subspace; their combination would not keep it. Combine adapters of one subspace.")
        if any(config.residual for config in protected.values()):
            raise ConfigError(f"adapters {adapters}: one has a residual (init='task'), which a weighted sum of factors would lose. Use export_lora first.")
    return original(self, adapters, *args, **kwargs)


def _get_padded_linear(original: Callable[..., Any], lora_module: Any, target_rank: int, is_lora_A: bool, **kwargs: Any) -> Any:
    """`prepare_model_for_compiled_hotswap` replaces the factors by wider plain ones: keep them protected."""
    from peft_safety.layers import ProtectedLinear

    padded = original(lora_module, target_rank, is_lora_A, **kwargs)
    if not isinstance(lora_module, ProtectedLinear) or padded is lora_module:
        return padded
    if lora_module.initial is not None:
        raise ConfigError("an adapter with a residual (init='task') cannot be padded for compiled hot-swapping. Use export_lora first.")
    return ProtectedLinear.replacing(padded, lora_module.basis, lora_module.side)


def _hotswap_adapter_from_state_dict(
    original: Callable[..., None], model: nn.Module, state_dict: dict[str, Any], adapter_name: str, config: Any, *args: Any, **kwargs: Any
) -> None:
    """Swap the factors, and the bases with them."""
    from peft_safety.methods.protected import ProtectedConfig, adapter_layers, bind, config_table, protected_configs

    there = protected_configs(model).get(adapter_name)
    if there is None and not isinstance(config, ProtectedConfig):
        return original(model, state_dict, adapter_name, config, *args, **kwargs)
    if not isinstance(config, ProtectedConfig):
        raise ConfigError(f"adapter {adapter_name!r} is protected; a {type(config).__name__} cannot be swapped into it. Load it under a new name.")
    layers = adapter_layers(model, adapter_name)
    if config.residual or (there is not None and there.residual):
        raise ConfigError("an adapter with a residual (init='task') cannot be hot-swapped. Use export_lora first.")
    subspace = config.subspace
    if set(subspace.bases) != set(layers):
        odd = sorted(set(subspace.bases) ^ set(layers))[:3]
        raise ArtifactError(f"the new adapter and {adapter_name!r} target other modules; they differ at {odd}. Load it under a new name.")
    subspace.check_fits({name: layer.get_base_layer() for name, layer in layers.items()}, config.SIDE)
    original(model, state_dict, adapter_name, config, *args, **kwargs)
    config._modules = {name: (int(layer.r[adapter_name]), layer.lora_alpha[adapter_name]) for name, layer in layers.items()}
    config_table(model)[adapter_name] = config
    bind(layers, adapter_name, config)
    return None


def _symbols() -> dict[str, tuple[str, ...]]:
    """What the canary test checks."""
    return SYMBOLS | (QUANTISED if importlib.util.find_spec("bitsandbytes") else {})


__all__ = ["PeftSafetyError", "config_types", "register"]
