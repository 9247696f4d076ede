"""Which weights answer or judge: the commit of a Hub id, the content of a directory."""

from __future__ import annotations

import json
import os
from hashlib import sha256
from pathlib import Path

from peft_safety.core.files import sha256 as sha256_of_file
from peft_safety.errors import ConfigError

READ = (".json", ".safetensors", ".bin", ".model", ".txt", ".jinja", ".py")
"""Ends of the files that a model or an adapter is loaded from."""


def version_of(source: str) -> str:
    """The version of a model, as it is loaded: of an adapter with that of the base model that it names."""
    own, folder = own_version(source)
    try:
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, LookupError, TypeError, ValueError):
        base = None
    return f"{own} on {version_of(base)}" if isinstance(base, str) and base else own


def own_version(source: str) -> tuple[str, Path]:
    """The version of what lies at a Hub id or in a directory alone, and the directory. A ConfigError: neither."""
    if os.path.isdir(source):
        return f"sha256:{_content(Path(source))}", Path(source)
    from huggingface_hub import try_to_load_from_cache

    for name in ("config.json", "adapter_config.json"):
        found = try_to_load_from_cache(source, name)
        if isinstance(found, str):
            folder = Path(found).parent
            return f"commit:{folder.name}", folder
    raise ConfigError(f"{source} is not in the Hub's cache, so its version is unknown. Give a directory.")


def _content(folder: Path) -> str:
    """A hash of names and bytes of the files that may be loaded: those in the folder, and shards below it."""
    names = {path.name for path in folder.iterdir() if path.suffix in READ}
    names |= {name for index in folder.glob("*.index.json") for name in _shards(index)}
    listed = [f"{name} {sha256_of_file(folder / name)}\n" for name in sorted(names) if (folder / name).is_file()]
    return sha256("".join(listed).encode()).hexdigest()


def _shards(index: Path) -> set[str]:
    """The files that an index names, which may lie in folders of their own."""
    try:
        return {str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    except (AttributeError, LookupError, OSError, TypeError, ValueError):
        return set()  # no index: its own bytes count
