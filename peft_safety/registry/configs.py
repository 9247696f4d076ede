"""Wrapped around PEFT's reading of configs: those of this package, and their directories, are checked before."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import LoraConfig

from peft_safety.core import files, publish
from peft_safety.core.adapter_dir import StoredAdapter, check_adapter, check_config, protected_types
from peft_safety.core.certificate import FILE_NAME as CERTIFICATE
from peft_safety.core.names import pin
from peft_safety.core.plain_lora import ADAPTER_FILE, MANIFEST, UNFIT, config_of, stored_record
from peft_safety.core.snapshot import Snapshot, named
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
    """A protected config gets a snapshot of its directory, checked, with the subspace, the shapes and full names."""
    source = pretrained_model_name_or_path  # PEFT's own name above: callers may use it
    caller = sys._getframe(2).f_globals.get("__name__", "").partition(".")[0]
    snapshot = snapshot_of(source, subfolder, kwargs)
    with named(snapshot):
        try:
            where = (source, subfolder) if snapshot is None else (str(snapshot.path), None)
            config = original(cls, *where, **kwargs)
            if snapshot is not None and is_plain_lora(config):
                config = certified(config, snapshot)
        except UNFIT as error:
            if isinstance(error, PeftSafetyError) or (snapshot is None and not issubclass(cls, ProtectedConfig)):
                raise
            what = f"{MANIFEST} of {source!r} is not a {cls.__name__}"
            raise ArtifactError(f"{what}: {error}. Save it again.") from error
        if not isinstance(config, ProtectedConfig):
            local = Path(source, subfolder or "") if snapshot is None else snapshot.path
            if getattr(config, "safe_lora", None) is None and (record := stored_record(local)) is not None:
                config.safe_lora = record  # so that a second repair is refused
            if snapshot is None and is_plain_lora(config) and _may_be_certified(source, subfolder, kwargs):
                config._uncertain = f"{source!r}"  # `injection` warns, where it is trained
            return config
        if snapshot is None:
            raise ArtifactError(f"{source!r} changed while it was read. Try again.")
        if not config.is_plain:
            if config.safety_artifact is None and not any(snapshot.path.glob("adapter_model*")):
                if caller not in ("peft", "transformers"):
                    return config  # a config alone, saved before any adapter was made from it
                raise ArtifactError(f"{source!r} holds a config without its {ADAPTER_FILE}. Copy the whole directory.")
            stored = check_adapter(snapshot.path)
            snapshot.worst_leak = stored.worst_leak
            take_over(config, stored)
    config._snapshot = snapshot
    return config


def is_plain_lora(config: Any) -> bool:
    """Whether it is PEFT's LoraConfig, or a class that a framework made of it, as ms-swift does on reading."""
    ours = type(config) in config_types().values()
    return isinstance(config, LoraConfig) and config.peft_type == "LORA" and not ours


def get_peft_type(original: Callable[..., Any], cls: Any, model_id: str, **kwargs: Any) -> Any:
    """PEFT asks for the type first, and would look on the Hub where an interrupted save left no config."""
    return _checked_folder(model_id, kwargs.get("subfolder"), kwargs)[1] or original(cls, model_id, **kwargs)


def snapshot_of(source: str | os.PathLike[str], subfolder: str | None, kwargs: dict[str, Any]) -> Snapshot | None:
    """The one that is being loaded, or a new one of the directory, local or fetched; None where nothing is ours."""
    local = Path(source, subfolder or "")
    if (existing := Snapshot.of(local)) is not None:
        return existing
    folder, kind = _checked_folder(source, subfolder, kwargs)
    if local.is_dir():
        if folder is not None and (kind in config_types() or os.path.lexists(local / CERTIFICATE)):
            return Snapshot(local, warn=True)
        publish.require_whole(local, ours=False)
        return None
    if kind in config_types():
        protected = issubclass(config_types()[kind], ProtectedConfig)
        names = (ADAPTER_FILE, FILE_NAME, MANIFEST) if protected else (MANIFEST,)
        if (folder := _folder(source, subfolder, kwargs, *names)) is None:
            raise ArtifactError(f"{source!r}: one of {', '.join(names)} cannot be fetched. Check the connection.")
    elif folder is not None:
        folder = _certified_folder(source, subfolder, kwargs) if kind == "LORA" else None
    return None if folder is None else Snapshot(folder)


def is_protected(source: str | os.PathLike[str], subfolder: str | None) -> bool:
    """Whether a directory holds a protected adapter. The Hub is not asked."""
    local = Path(source, subfolder or "")
    certified = os.path.lexists(local / CERTIFICATE)
    return (local / MANIFEST).is_file() and (_check_file(local / MANIFEST) in protected_types() or certified)


def _checked_folder(
    source: str | os.PathLike[str], subfolder: str | None, kwargs: dict[str, Any]
) -> tuple[Path | None, str]:
    """The folder of the config, local or fetched, once the config is checked; None without one, which PEFT reports.
    And its peft_type.
    """
    local = Path(source, subfolder or "")
    if local.is_dir():
        publish.require_whole(local, ours=False, warn=False)
    folder = local if (local / MANIFEST).is_file() else _folder(source, subfolder, kwargs, MANIFEST)
    return folder, "" if folder is None else _check_file(folder / MANIFEST)


def _check_file(path: Path) -> str:
    """Parse a config of this package with limits before PEFT sees it, and refuse one that hides what it is. Returns
    its peft_type.
    """
    raw = files.read_bytes(path, files.MAX_LISTING_BYTES)
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError):
        content = None  # truncated, too long or not JSON: ours if it names one of our types
    fields = content if isinstance(content, dict) else {}
    kind = fields.get("peft_type")
    ours = isinstance(kind, str) and kind in config_types()
    certified = os.path.lexists(path.parent / CERTIFICATE)
    unreadable = not isinstance(kind, str) and (
        certified or (path.parent / FILE_NAME).exists() or any(name.encode() in raw for name in config_types())
    )
    if ours or unreadable:
        files.parse_json(raw, str(path), files.MAX_LISTING_BYTES)
    publish.require_whole(path.parent, ours=ours or unreadable, warn=False)
    other = not ours and (fields.get("safety_artifact") is not None or (certified and kind != "LORA"))
    if unreadable or other:
        raise ArtifactError(
            f"{path}: peft_type {kind!r} would load a protected adapter without its protection. Copy or save the "
            "adapter again; to make it a plain LoRA on purpose, use peft_safety.export_lora."
        )
    if ours and fields.get("safety_artifact") is not None:
        check_config(fields, str(path))
    return kind if isinstance(kind, str) else ""


def _certified_folder(source: str | os.PathLike[str], subfolder: str | None, kwargs: dict[str, Any]) -> Path | None:
    """The folder in the Hub's cache of an adapter with a certificate; None without one, or where none can be fetched
    (`_may_be_certified`); else an ArtifactError.
    """
    try:
        _fetch(source, CERTIFICATE, subfolder, kwargs)
    except (EntryNotFoundError, HFValidationError):
        return None
    except HfHubHTTPError as error:
        raise ArtifactError(f"{source!r}: whether it has a {CERTIFICATE} is unknown ({error}). Try again.") from error
    if (folder := _folder(source, subfolder, kwargs, ADAPTER_FILE)) is None:
        raise ArtifactError(f"{source!r} has a {CERTIFICATE}, but its {ADAPTER_FILE} cannot be fetched. Try again.")
    return folder


def _may_be_certified(source: str | os.PathLike[str], subfolder: str | None, kwargs: dict[str, Any]) -> bool:
    """Whether nobody knows if a repository has a certificate: the Hub was not asked, and the cache holds neither the
    file nor a note that there is none.
    """
    if Path(source, subfolder or "").is_dir():
        return False
    name = "/".join(filter(None, (subfolder, CERTIFICATE)))
    where = {option: kwargs[option] for option in ("cache_dir", "revision") if option in kwargs}
    return try_to_load_from_cache(str(source), name, **where) is None


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
