"""Wrapped around PEFT's reading of configs: those of this package, and their directories, are checked before."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import LoraConfig

from peft_safety.core import files, publish
from peft_safety.core.adapter_dir import StoredAdapter, check_adapter, check_config
from peft_safety.core.certificate import FILE_NAME as CERTIFICATE
from peft_safety.core.names import pin
from peft_safety.core.plain_lora import ADAPTER_FILE, MANIFEST, config_of, stored_record
from peft_safety.core.subspace_file import FILE_NAME
from peft_safety.errors import ArtifactError, PeftSafetyError
from peft_safety.methods.base import ProtectedConfig
from peft_safety.registry.frozen import certified
from peft_safety.registry.types import config_types


def config_from_pretrained(
    original: Callable[..., Any],
    cls: Any,
    pretrained_model_name_or_path: str,
    subfolder: str | None = None,
    **kwargs: Any,
) -> Any:
    """A protected config gets its checked directory, with the subspace, the shapes and the full module names."""
    source = pretrained_model_name_or_path  # PEFT's own name above: callers may use it
    local = Path(source, subfolder or "")
    folder = _checked_folder(source, subfolder, kwargs, warn=True)
    try:
        config = original(cls, source if folder is None else folder, subfolder if folder is None else None, **kwargs)
    except (TypeError, ValueError) as error:
        if isinstance(error, PeftSafetyError) or not issubclass(cls, ProtectedConfig):
            raise
        raise ArtifactError(f"{MANIFEST} of {source!r} is not a {cls.__name__}: {error}. Save it again.") from error
    if type(config) is LoraConfig:
        whole = local if local.is_dir() else _certified_folder(source, subfolder, kwargs)
        config = config if whole is None else certified(config, whole)
    if not isinstance(config, ProtectedConfig):
        if getattr(config, "safe_lora", None) is None and (record := stored_record(local)) is not None:
            config.safe_lora = record  # so that a second repair is refused
        return config
    if config.is_plain:
        return config
    if config.safety_artifact is None and local.is_dir() and not any(local.glob("adapter_model*")):
        return config  # a config alone, saved before any adapter was made from it
    names = (ADAPTER_FILE, FILE_NAME, MANIFEST)
    directory = local if local.is_dir() else _folder(source, subfolder, kwargs, *names)
    if directory is None:
        raise ArtifactError(f"{source!r}: one of {', '.join(names)} cannot be fetched. Check the connection.")
    take_over(config, check_adapter(directory))
    return config


def get_peft_type(original: Callable[..., Any], cls: Any, model_id: str, **kwargs: Any) -> Any:
    """PEFT asks for the type first, and would look on the Hub where an interrupted save left no config."""
    folder = _checked_folder(model_id, kwargs.get("subfolder"), kwargs, warn=False)
    if folder is None:
        return original(cls, model_id, **kwargs)
    return original(cls, str(folder), **{**kwargs, "subfolder": None})


def _checked_folder(
    source: str | os.PathLike[str], subfolder: str | None, kwargs: dict[str, Any], warn: bool
) -> str | None:
    """The folder of the config, local or fetched, once the config is checked; None without one, which PEFT reports."""
    local = Path(source, subfolder or "")
    if local.is_dir():
        publish.require_whole(local, ours=False, warn=warn)
    folder = local if (local / MANIFEST).is_file() else _folder(source, subfolder, kwargs, MANIFEST)
    if folder is None:
        return None
    _check_file(folder / MANIFEST)
    return str(folder)


def _check_file(path: Path) -> None:
    """Parse a config of this package with limits before PEFT sees it, and refuse one that hides what it is."""
    with path.open("rb") as file:
        raw = file.read(files.MAX_JSON_BYTES + 1)
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError):
        content = None  # truncated, too long or not JSON: ours if it names one of our types
    fields = content if isinstance(content, dict) else {}
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
            "adapter again; to make it a plain LoRA on purpose, use peft_safety.export_lora."
        )
    if ours and fields.get("safety_artifact") is not None:
        check_config(fields, str(path))


def _certified_folder(source: str, subfolder: str | None, kwargs: dict[str, Any]) -> Path | None:
    """The folder in the Hub's cache of an adapter with a certificate; None without one; else an ArtifactError."""
    try:
        _fetch(source, CERTIFICATE, subfolder, kwargs)
        return _fetch(source, ADAPTER_FILE, subfolder, kwargs).parent
    except (EntryNotFoundError, HFValidationError):
        return None
    except HfHubHTTPError as error:
        raise ArtifactError(f"{source!r}: whether it has a {CERTIFICATE} is unknown ({error}). Try again.") from error


def _folder(source: str | os.PathLike[str], subfolder: str | None, kwargs: dict[str, Any], *names: str) -> Path | None:
    """The folder in the Hub's cache with these files of a repository; None if one cannot be fetched."""
    try:
        paths = [_fetch(source, name, subfolder, kwargs) for name in names]
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError):
        return None
    return paths[-1].parent


def _fetch(source: str | os.PathLike[str], name: str, subfolder: str | None, kwargs: dict[str, Any]) -> Path:
    options = ("revision", "token", "cache_dir", "force_download", "local_files_only", "proxies", "etag_timeout")
    given = {option: kwargs[option] for option in options if option in kwargs}
    return Path(hf_hub_download(str(source), name, subfolder=subfolder, **given))


def stored_config(stored: StoredAdapter) -> ProtectedConfig:
    """The config of a checked directory, as loading would make it."""
    config: ProtectedConfig = config_of(stored.config, stored.directory / MANIFEST)
    take_over(config, stored)
    return config


def take_over(config: ProtectedConfig, stored: StoredAdapter) -> None:
    """Give a config the subspace, modules, ranks and alphas of a checked directory, instead of any pattern."""
    if stored.residual != config.residual:
        raise ArtifactError(f"{stored.directory}: its factors are of another init than the config's. Save it again.")
    config._stored = stored
    config.subspace = stored.subspace
    alphas: dict[str, float] = stored.config.get("alpha_pattern") or {}
    config._modules = {
        name: (rank, alphas.get(name, stored.config["lora_alpha"])) for name, (_, _, rank) in stored.shapes.items()
    }
    pin(config, config._modules)
    mapping: Any = getattr(config, "auto_mapping", None)
    if not isinstance(mapping, dict) or not str(mapping.get("parent_library")).startswith("transformers."):
        config.auto_mapping = None  # AutoPeftModel would import the class that it names
