"""Wrapped around PEFT's reading of configs: one of this package is checked before PEFT reads it, and comes with its
checked directory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
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

NOT_FETCHED = (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError)


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
    source = pretrained_model_name_or_path  # PEFT's own name above: callers may use it
    local = Path(source, subfolder or "")
    if local.is_dir():
        publish.require_whole(local, ours=False)
    checked = _checked_folder(source, subfolder, kwargs)
    try:
        if checked is None:
            config = original(cls, source, subfolder, **kwargs)
        else:
            config = original(cls, checked, None, **kwargs)
    except (TypeError, ValueError) as error:
        if isinstance(error, PeftSafetyError) or not issubclass(cls, ProtectedConfig):
            raise
        raise ArtifactError(
            f"{source!r}: its adapter_config.json is not a {cls.__name__}: {error}. Save the adapter again."
        ) from error
    if type(config) is LoraConfig:
        folder = local if local.is_dir() else _certificate_folder(source, subfolder, kwargs)
        config = config if folder is None else certified(config, folder)
    if isinstance(config, ProtectedConfig) and config.is_plain:
        return config
    if not isinstance(config, ProtectedConfig):
        if getattr(config, "safe_lora", None) is None and (record := stored_record(local)) is not None:
            config.safe_lora = record  # so that a second repair is refused
        return config
    if config.safety_artifact is None and local.is_dir() and not any(local.glob("adapter_model*")):
        return config  # a config alone, saved before any adapter was made from it
    take_over(config, check_adapter(_directory(source, subfolder, kwargs)))
    return config


def get_peft_type(original: Callable[..., Any], cls: Any, model_id: str, **kwargs: Any) -> Any:
    """PEFT asks for the type first: where an interrupted publish left no config yet, say that instead of looking for
    the directory on the Hub.
    """
    subfolder = kwargs.get("subfolder")
    local = Path(model_id, subfolder or "")
    if local.is_dir():
        publish.require_whole(local, ours=False, warn=False)
    checked = _checked_folder(model_id, subfolder, kwargs)
    if checked is None:
        return original(cls, model_id, **kwargs)
    return original(cls, checked, **{**kwargs, "subfolder": None})


def _checked_folder(source: str | os.PathLike[str], subfolder: str | None, kwargs: dict[str, Any]) -> str | None:
    """The folder of the config, local or fetched, once the config is checked; None without one, which PEFT reports."""
    path = Path(source, subfolder or "", MANIFEST)
    if not path.is_file():
        try:
            path = _fetched(source, MANIFEST, subfolder, kwargs)
        except NOT_FETCHED:
            return None
    _check_file(path)
    return str(path.parent)


def _check_file(path: Path) -> None:
    """A config of this package is parsed with limits before PEFT sees it, and refused where it hides what it is; any
    other is left to PEFT.
    """
    with path.open("rb") as file:
        raw = file.read(files.MAX_JSON_BYTES + 1)
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError):
        content = None  # truncated, too long or not JSON: ours if anything says so
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


def _directory(source: str | os.PathLike[str], subfolder: str | None, kwargs: dict[str, Any]) -> Path:
    """The directory of an adapter; from the Hub, its three files are fetched (or found in the cache) first."""
    local = Path(source, subfolder or "")
    if local.is_dir():
        return local
    try:
        paths = [_fetched(source, name, subfolder, kwargs) for name in (ADAPTER_FILE, FILE_NAME, MANIFEST)]
    except NOT_FETCHED as error:
        raise ArtifactError(
            f"{source!r}: a protected adapter needs {ADAPTER_FILE}, {FILE_NAME} and {MANIFEST}; one cannot be fetched "
            f"({type(error).__name__})."
        ) from error
    return paths[-1].parent


def _certificate_folder(source: str, subfolder: str | None, kwargs: dict[str, Any]) -> Path | None:
    """The folder of a plain LoRA's certificate on the Hub, its factors beside it; None without one."""
    try:
        folder = _fetched(source, CERTIFICATE, subfolder, kwargs).parent
        _fetched(source, ADAPTER_FILE, subfolder, kwargs)
    except NOT_FETCHED:
        return None
    return folder


def _fetched(source: str | os.PathLike[str], name: str, subfolder: str | None, kwargs: dict[str, Any]) -> Path:
    """One file of a repository on the Hub, from the cache where it is there."""
    options = ("revision", "token", "cache_dir", "force_download", "local_files_only", "proxies", "etag_timeout")
    given = {option: kwargs[option] for option in options if option in kwargs}
    return Path(hf_hub_download(str(source), name, subfolder=subfolder, **given))


def stored_config(stored: StoredAdapter) -> ProtectedConfig:
    """The config of a checked directory, as loading would make it.

    Raises:
        PeftSafetyError: a field that the method cannot honor, or that is not of this config's types.
    """
    config: ProtectedConfig = config_of(stored.config, stored.directory / MANIFEST)
    take_over(config, stored)
    return config


def take_over(config: ProtectedConfig, stored: StoredAdapter) -> None:
    """Make a config that of a checked directory: its subspace, its modules, their ranks and alphas, in place of
    any pattern.
    """
    if stored.residual != config.residual:
        raise ArtifactError(
            f"{stored.directory}: its factors are of another init than {type(config).__name__} says. Save the "
            "adapter again."
        )
    config._stored = stored
    config.subspace = stored.subspace
    alphas: dict[str, float] = stored.config.get("alpha_pattern") or {}
    config._modules = {
        name: (rank, alphas.get(name, stored.config["lora_alpha"])) for name, (_, _, rank) in stored.shapes.items()
    }
    pin(config, config._modules)
    mapping: Any = getattr(config, "auto_mapping", None)
    if not isinstance(mapping, dict) or not str(mapping.get("parent_library")).startswith("transformers."):
        config.auto_mapping = None  # AutoPeftModel would import whatever it names
