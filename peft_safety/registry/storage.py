"""Wrapped around PEFT's saving and loading: what is read is checked first, what is written is published whole."""

from __future__ import annotations

import inspect
import json
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from peft_safety.errors import ArtifactError, ConfigError, PeftSafetyError
from peft_safety.names import places, relocated
from peft_safety.registry.types import config_types


def from_json_file(original: Callable[..., Any], cls: Any, path_json_file: str, **kwargs: Any) -> Any:
    """A config of this package is parsed with limits before PEFT sees it, and refused where it hides what it is; any
    other is PEFT's business.
    """
    from peft_safety import files, publish
    from peft_safety.artifact import check_config
    from peft_safety.subspace import FILE_NAME

    path = Path(path_json_file)
    with path.open("rb") as file:
        raw = file.read(files.MAX_JSON_BYTES + 1)
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):
        found = None  # truncated, too long or not JSON: ours if anything says so
    fields = found if isinstance(found, dict) else {}
    kind = fields.get("peft_type")
    ours = isinstance(kind, str) and kind in config_types()
    unreadable = not isinstance(kind, str) and (
        (path.parent / FILE_NAME).exists() or any(name.encode() in raw for name in config_types())
    )
    if ours or unreadable:
        files.read_json(path)
    publish.require_whole(path.parent, ours=ours or unreadable, warn=False)
    if unreadable or (not ours and fields.get("safety_artifact") is not None):
        raise ArtifactError(
            f"{path}: peft_type {kind!r} would load a protected adapter without its protection. Copy or save the "
            "adapter again; to make it a plain LoRA on "
            "purpose, use peft_safety.export_lora."
        )
    if ours and fields.get("safety_artifact") is not None:
        check_config(fields, str(path))
    return original(cls, path_json_file, **kwargs)


def config_from_pretrained(
    original: Callable[..., Any],
    cls: Any,
    pretrained_model_name_or_path: str,
    subfolder: str | None = None,
    **kwargs: Any,
) -> Any:
    """A protected config comes with its checked directory: whatever loads it next finds subspace, shapes and full
    module names.
    """
    from peft_safety import publish
    from peft_safety.artifact import check_adapter
    from peft_safety.methods.protected import ProtectedConfig

    source = pretrained_model_name_or_path  # PEFT's own name above: callers may use it
    local = Path(source, subfolder) if subfolder else Path(source)
    if local.is_dir():
        publish.require_whole(local, ours=False)
    try:
        config = original(cls, source, subfolder, **kwargs)
    except (TypeError, ValueError) as error:
        if isinstance(error, PeftSafetyError) or not issubclass(cls, ProtectedConfig):
            raise
        raise ArtifactError(
            f"{source!r}: its adapter_config.json is not a {cls.__name__}: {error}. Save the adapter again."
        ) from error
    if not isinstance(config, ProtectedConfig):
        from peft_safety.plain_lora import stored_record

        if getattr(config, "safe_lora", None) is None and (record := stored_record(local)) is not None:
            config.safe_lora = record  # so that a second repair is refused
        return config
    if config.safety_artifact is None and local.is_dir() and not any(local.glob("adapter_model*")):
        return config  # a config alone, saved before any adapter was made from it
    config.take(check_adapter(_directory(source, subfolder, kwargs)))
    return config


def get_peft_type(original: Callable[..., Any], cls: Any, model_id: str, **kwargs: Any) -> Any:
    """PEFT asks for the type first: where an interrupted publish left no config yet, say that instead of looking for
    the directory on the Hub.
    """
    from peft_safety import publish

    local = Path(model_id, kwargs.get("subfolder") or "")
    if local.is_dir():
        publish.require_whole(local, ours=False, warn=False)
    return original(cls, model_id, **kwargs)


def _directory(source: str | os.PathLike[str], subfolder: str | None, kwargs: dict[str, Any]) -> Path:
    """The directory of an adapter; from the Hub, its three files are fetched (or found in the cache) first."""
    local = Path(source, subfolder) if subfolder else Path(source)
    if local.is_dir():
        return local
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    from peft_safety.plain_lora import ADAPTER_FILE, MANIFEST
    from peft_safety.subspace import FILE_NAME

    options = {
        k: v
        for k, v in kwargs.items()
        if k in ("revision", "token", "cache_dir", "force_download", "local_files_only", "proxies", "etag_timeout")
    }
    try:
        paths = [
            Path(hf_hub_download(str(source), name, subfolder=subfolder, **options))
            for name in (ADAPTER_FILE, FILE_NAME, MANIFEST)
        ]
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ArtifactError(
            f"{source!r}: a protected adapter needs {ADAPTER_FILE}, {FILE_NAME} and {MANIFEST}; one cannot be fetched "
            f"({type(error).__name__})."
        ) from error
    return paths[-1].parent


def save_pretrained(original: Callable[..., None], self: Any, save_directory: str, *args: Any, **kwargs: Any) -> None:
    """Save into a staging folder, complete and check what is there, publish it in one step. Adapters that are not
    protected come along.
    """
    from peft_safety.artifact import check_adapter, seal
    from peft_safety.layers import folded_state, protected_leaves
    from peft_safety.methods.protected import assert_protected, protected_configs
    from peft_safety.plain_lora import ADAPTER_FILE, CARD, MANIFEST, PREFIX
    from peft_safety.publish import copy_own, is_interrupted, publishing, recover

    given = (
        inspect.signature(original).bind(self, save_directory, *args, **kwargs).arguments
    )  # by name, however the caller passed them
    selected = given.get("selected_adapters") or list(self.peft_config)
    protected = [name for name in protected_configs(self) if name in selected]
    main = given.get("is_main_process", True)
    if not protected or not main:
        if main and is_interrupted(Path(save_directory)):  # finished later, it would replace what is saved now
            recover(Path(save_directory))
        original(self, save_directory, *args, **kwargs)
        if main:
            _record_repairs(self, selected, Path(save_directory))
        return None
    if not given.get("safe_serialization", True):
        raise ConfigError(
            "safe_serialization=False writes pickles, which this package never reads. Save as safetensors."
        )
    if given.get("path_initial_model_for_weight_conversion") is not None:
        raise ConfigError(
            "path_initial_model_for_weight_conversion is for inits that rewrite the base weight. Use "
            "peft_safety.export_lora."
        )
    for name in protected:
        assert_protected(self, name)
        if (missing := self.peft_config[name].unfinished) is not None:
            warnings.warn(f"adapter {name!r}: {missing}", stacklevel=3)
    if Path(save_directory).is_file():
        raise ArtifactError(f"{save_directory} is a file. Give a directory.")
    state = kwargs.get("state_dict")
    if state is not None or any(hasattr(leaf.raw(), "device_mesh") for _, leaf in protected_leaves(self)):
        # gathered weights come as the optimizer left them
        kwargs["state_dict"] = folded_state(self, self.state_dict() if state is None else state)
    with publishing(Path(save_directory), MANIFEST) as staging:
        copy_own(Path(save_directory), CARD, staging)  # PEFT adds to a model card that is there
        original(self, str(staging), *args, **kwargs)
        for name in protected:
            folder = staging if name == "default" else staging / name
            _rename(folder / ADAPTER_FILE, {there: f"{PREFIX}{name}" for name, there in places(self).items()})
            seal(folder)
            check_adapter(folder)
        _record_repairs(self, selected, staging)
    return None


def _rename(path: Path, names: Mapping[str, str]) -> None:
    """Give the tensors of an adapter file the base model's own names of their modules: wrappers inside the model show
    in PEFT's.
    """
    from safetensors.torch import save_file

    from peft_safety import files

    if all(name == own for name, own in names.items()):
        return
    with files.open_tensors(path) as handle:
        metadata = handle.metadata()
        tensors = {relocated(key, names): handle.get_tensor(key).clone() for key in handle.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata=metadata)


def set_peft_model_state_dict(
    original: Callable[..., Any],
    model: Any,
    peft_model_state_dict: dict[str, Any],
    adapter_name: str = "default",
    *args: Any,
    **kwargs: Any,
) -> Any:
    """A stored adapter has the base model's own names; wrappers inside the model are put back into them."""
    from peft_safety.methods.protected import protected_configs
    from peft_safety.plain_lora import PREFIX

    if adapter_name in protected_configs(model):
        there = {f"{PREFIX}{name}": place for name, place in places(model).items()}
        if any(name != place for name, place in there.items()):
            peft_model_state_dict = {relocated(key, there): value for key, value in peft_model_state_dict.items()}
    return original(model, peft_model_state_dict, adapter_name, *args, **kwargs)


def _record_repairs(model: Any, selected: list[str], directory: Path) -> None:
    """Safe LoRA leaves plain factors: what was done to them is written beside them, and that nothing was done is
    said.
    """
    from peft_safety.methods.safe_lora.config import SafeLoRAConfig
    from peft_safety.plain_lora import ADAPTER_FILE, stamp

    for name in selected:
        config, folder = model.peft_config[name], directory if name == "default" else directory / name
        record = getattr(config, "safe_lora", None)
        if record is not None and (folder / ADAPTER_FILE).is_file():
            stamp(folder, record)
        elif isinstance(config, SafeLoRAConfig):
            warnings.warn(
                f"adapter {name!r} is saved before Safe LoRA was applied to it: it is as unsafe as any LoRA. Use "
                "SafeLoRACallback, apply_safe_lora, or "
                "peft-safety repair.",
                stacklevel=4,
            )


def load_adapter(
    original: Callable[..., Any], self: Any, model_id: str, adapter_name: str, *args: Any, **kwargs: Any
) -> Any:
    """Loading onto an adapter that is there (a resumed run): check the directory first, and bring its bases along."""
    from peft import PeftConfig

    from peft_safety.layers import lay_out_adapter
    from peft_safety.methods.protected import ProtectedConfig, adapter_layers, bind, check_ahead
    from peft_safety.methods.reuse import remember

    config = self.peft_config.get(adapter_name)
    fresh = (
        isinstance(config, ProtectedConfig)
        and config._stored is not None
        and config._stored.comes_from(str(model_id), kwargs.get("subfolder"))
    )
    if not isinstance(config, ProtectedConfig) or fresh:
        result = original(self, model_id, adapter_name, *args, **kwargs)
        config = self.peft_config.get(adapter_name)
        if isinstance(config, ProtectedConfig):
            config._stored = None
            lay_out_adapter(self, adapter_name)  # with low_cpu_mem_usage the factors are what the file's reader made
        return result
    options = {k: v for k, v in kwargs.items() if k in ("subfolder", "revision", "token", "cache_dir")}
    stored = PeftConfig.from_pretrained(str(model_id), **options)
    if type(stored) is not type(config):
        raise ConfigError(
            f"adapter {adapter_name!r} is protected ({type(config).__name__}), {model_id} holds a "
            f"{type(stored).__name__}. Load it under a new name."
        )
    if stored._stored is None:
        raise ArtifactError(
            f"{model_id} holds a config without an adapter. Give a directory that save_pretrained wrote."
        )
    check_ahead(self, stored)
    layers = adapter_layers(self, adapter_name)
    _check_same(adapter_name, str(model_id), stored, config, layers)
    stored.subspace.check_fits({name: layer.get_base_layer() for name, layer in layers.items()}, config.basis_sides)
    config.subspace = stored.subspace
    remember(config, loaded=True)
    bind(layers, adapter_name, config)
    return original(self, model_id, adapter_name, *args, **kwargs)


def _check_same(adapter_name: str, source: str, stored: Any, config: Any, layers: Any) -> None:
    found = {name: rank for name, (_, _, rank) in stored._stored.shapes.items()}
    here = {name: int(layer.r[adapter_name]) for name, layer in layers.items()}
    if stored.sides != config.sides:
        raise ArtifactError(
            f"{source} is constrained on sides {stored.sides}, adapter {adapter_name!r} on {config.sides}. Load it "
            "under a new name."
        )
    if found != here or stored._stored.residual != config.residual:
        odd = sorted(set(found.items()) ^ set(here.items()))[:3]
        raise ArtifactError(
            f"{source}: its modules, ranks or init are not those of adapter {adapter_name!r}; they differ at {odd}. "
            "Load it under a new name."
        )
