"""Wrapped around PEFT's saving and loading: what is read is checked first, what is written is published whole."""

from __future__ import annotations

import inspect
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.tuners.xlora import XLoraModel
from safetensors.torch import save_file
from torch import Tensor, nn

from peft_safety.core import files
from peft_safety.core.adapter_dir import VELORA, check_adapter, seal
from peft_safety.core.certificate import FILE_NAME as CERTIFICATE
from peft_safety.core.names import by_number, places, public_name, relocated
from peft_safety.core.plain_lora import ADAPTER_FILE, CARD, MANIFEST, PREFIX, rewrite
from peft_safety.core.publish import copy_own, is_interrupted, publishing, recover
from peft_safety.core.snapshot import Snapshot, named
from peft_safety.core.subspace_file import FILE_NAME as SUBSPACE
from peft_safety.errors import ArtifactError, ConfigError
from peft_safety.layers.adapters import adapter_layers
from peft_safety.layers.factor_table import fold_tables, folded_tables, protected_tables
from peft_safety.layers.protected_linear import deferred_folds, protected_leaves
from peft_safety.layers.stored import folded_state, is_half, lay_out_adapter
from peft_safety.methods.base import ProtectedConfig
from peft_safety.methods.safe_lora.config import SafeLoRAConfig
from peft_safety.registry.attach import bind
from peft_safety.registry.checks import check_ahead
from peft_safety.registry.configs import is_protected, snapshot_of
from peft_safety.registry.frozen import check_certified, take_over
from peft_safety.registry.protection import check_adapters, protected_configs
from peft_safety.registry.reuse import NEW_NAME, check_scalings, remember, sizes
from peft_safety.registry.rollback import Before, undone


def save_pretrained(original: Callable[..., None], self: Any, save_directory: str, *args: Any, **kwargs: Any) -> None:
    """Save all selected adapters into a staging folder, complete and check it, and publish it in one step."""
    # by name, however the caller passed them
    given = inspect.signature(original).bind(self, save_directory, *args, **kwargs).arguments
    selected = given.get("selected_adapters") or list(self.peft_config)
    protected = [name for name in protected_configs(self) if name in selected]
    main = given.get("is_main_process", True)
    if not protected or not main:
        if main and is_interrupted(Path(save_directory)):  # finished later, it would replace this save
            recover(Path(save_directory))
        original(self, save_directory, *args, **kwargs)
        if main:
            _record_repairs(self, selected, Path(save_directory))
            _drop_stale(self, selected, Path(save_directory))
        return None
    args, kwargs = _without_pickle(given, args, kwargs)
    if given.get("path_initial_model_for_weight_conversion") is not None:
        raise ConfigError(
            "path_initial_model_for_weight_conversion is for inits that change base weights. Use export_lora."
        )
    for name in protected:
        check_adapters(self, name)
        if (missing := self.peft_config[name].unfinished) is not None:
            warnings.warn(f"adapter {name!r}: {missing}", stacklevel=3)
    if Path(save_directory).is_file():
        raise ArtifactError(f"{save_directory} is a file. Give a directory.")
    state = kwargs.get("state_dict")
    sharded = any(hasattr(p, "device_mesh") or hasattr(p, "ds_id") for p in self.parameters())
    half = any(is_half(leaf) for _, leaf in protected_leaves(self)) or any(
        t.is_half for _, t in protected_tables(self)
    )
    if state is not None or sharded or half:
        # gathered weights are as the optimizer left them, not projected; those in 16 bits are saved in fp32
        kwargs["state_dict"] = folded_tables(self, folded_state(self, self.state_dict() if state is None else state))
    with publishing(Path(save_directory), MANIFEST) as staging, _stored_sizes(self, protected):
        copy_own(Path(save_directory), CARD, staging)  # PEFT adds to an existing model card
        original(self, str(staging), *args, **kwargs)
        _hide_path(self, staging / CARD)
        names = {place: f"{PREFIX}{own}" for own, place in places(self).items()}  # without wrappers inside the model
        for name in protected:
            config, folder = self.peft_config[name], staging if name == "default" else staging / name
            if isinstance(self.base_model, XLoraModel):
                save_file(_expert(self, name, kwargs.get("state_dict")), folder / ADAPTER_FILE, {"format": "pt"})
            rewrite(folder / ADAPTER_FILE, lambda key: relocated(key, names))
            if (certificate := config._certificate) is not None:
                check_certified(folder, certificate)
            else:
                seal(folder)
                _warn_unnamed(config, check_adapter(folder).extra_tensors)
        _record_repairs(self, selected, staging)
    _drop_stale(self, selected, Path(save_directory))
    return None


@contextmanager
def _stored_sizes(model: Any, adapters: Sequence[str]) -> Iterator[None]:
    """The configs say the ranks and alphas of the factors as they are: padding for compiled hot swaps changes them.
    Afterwards they say again what they said, by which PEFT compares configs before the next swap.
    """
    before = {name: model.peft_config[name]._modules for name in adapters}
    try:
        for name in adapters:
            model.peft_config[name]._modules = sizes(adapter_layers(model, name), name)
        yield
    finally:
        for name, modules in before.items():
            model.peft_config[name]._modules = modules


def _without_pickle(given: dict[str, Any], args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The arguments of a save, with `safe_serialization=True`."""
    if given.get("safe_serialization", True):
        return args, kwargs
    warnings.warn(
        "safe_serialization=False: a protected adapter is saved as safetensors all the same. A pickle can run code "
        "when it is read, so this package reads none.",
        stacklevel=4,
    )
    own = {name: value for name, value in given.items() if name not in ("self", "save_directory", "kwargs")}
    return (), {**given.get("kwargs", {}), **own, "safe_serialization": True}


def _expert(model: Any, name: str, given: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """The factors of one adapter of an X-LoRA model. PEFT writes other tensors: it takes the numbers of layers for
    names of adapters, and every tensor of the model, whose prefix is "lora_model", for a factor.
    """
    state = folded_tables(model, folded_state(model, model.state_dict() if given is None else given))
    parts = {f"lora_{x}.{name}.{kind}": f"lora_{x}.{kind}" for x in "AB" for kind in ("weight", "initial")}
    parts |= {f"lora_embedding_{x}.{name}": f"lora_embedding_{x}" for x in "AB"}
    parts[f"{VELORA}.{name}"] = VELORA
    where = places(model)
    keys = {
        f"{where[own]}.{part}": f"{PREFIX}{own}.{new}"
        for own in adapter_layers(model, name)
        for part, new in parts.items()
    }
    return {new: state[key].contiguous() for key, new in keys.items() if key in state}


def _hide_path(model: Any, card: Path) -> None:
    """PEFT's card names the base model by its path; of a local one only the last part stays."""
    base = str(getattr(getattr(model.get_base_model(), "config", None), "_name_or_path", ""))
    if card.is_file() and (shown := public_name(base)) != base:
        card.write_text(card.read_text(encoding="utf-8").replace(base, shown), encoding="utf-8")


def _warn_unnamed(config: ProtectedConfig, extra: Sequence[str]) -> None:
    """PEFT also stores embeddings that it thinks were resized."""
    if extra and not (config.modules_to_save or config.trainable_token_indices):
        warnings.warn(
            f"the adapter holds {extra}, which its config does not name: it loads only where they are equal. Train "
            "them by modules_to_save, or save with save_embedding_layers=False.",
            stacklevel=4,
        )


def _drop_stale(model: Any, selected: list[str], directory: Path) -> None:
    """Remove what an adapter of another form has left: a certificate of other factors, bases that nothing uses."""
    for name in selected:
        config, folder = model.peft_config[name], directory if name == "default" else directory / name
        protected = isinstance(config, ProtectedConfig)
        files.drop(folder / (SUBSPACE if protected and config.is_plain else CERTIFICATE))


def _record_repairs(model: Any, selected: list[str], directory: Path) -> None:
    """Write the record of a Safe LoRA repair into the saved adapter, and warn where there was no repair."""
    for name in selected:
        config, folder = model.peft_config[name], directory if name == "default" else directory / name
        record = getattr(config, "safe_lora", None)
        if record is not None and (folder / ADAPTER_FILE).is_file():
            rewrite(folder / ADAPTER_FILE, record=record)
        elif isinstance(config, SafeLoRAConfig):
            warnings.warn(
                f"adapter {name!r} is saved before Safe LoRA was applied to it: it is as unsafe as any LoRA. Use "
                "SafeLoRACallback, apply_safe_lora, or peft-safety repair.",
                stacklevel=4,
            )


def load_adapter(
    original: Callable[..., Any], self: Any, model_id: str, adapter_name: str, *args: Any, **kwargs: Any
) -> Any:
    """Load from the snapshot that was checked. If anything fails, the model is as it was."""
    name, snapshot, injected = vars(self.base_model).pop("_pending", (None, None, None))
    existing = self.peft_config.get(adapter_name)
    if existing is not None and not isinstance(existing, ProtectedConfig):
        if is_protected(model_id, kwargs.get("subfolder")):
            plain = f"{model_id} holds a protected adapter, loaded as an ordinary {type(existing).__name__}"
            warnings.warn(
                f"{plain}: training it is not constrained. Leave out config=, or use another adapter_name.",
                stacklevel=3,
            )
        return original(self, model_id, adapter_name, *args, **kwargs)
    fresh = name == adapter_name and snapshot is not None and snapshot.comes_from(model_id, kwargs.get("subfolder"))
    if not fresh:
        snapshot = snapshot_of(model_id, kwargs.get("subfolder"), kwargs)
    if snapshot is None and existing is None:
        return original(self, model_id, adapter_name, *args, **kwargs)
    just_made = fresh and sys._getframe(2).f_code.co_name == "from_pretrained"
    before = injected if just_made else Before(self, adapter_name)
    folder = model_id if snapshot is None else str(snapshot.path)
    try:
        with undone(before, str(model_id)), named(snapshot):
            return _load(original, self, folder, adapter_name, fresh, *args, **{**kwargs, "subfolder": None})
    finally:
        vars(self.base_model).pop("_pending", None)


def _load(
    original: Callable[..., Any], self: Any, folder: str, adapter_name: str, fresh: bool, *args: Any, **kwargs: Any
) -> Any:
    """Onto an existing adapter (a resumed run): check the directory first, and take its bases too."""
    config = self.peft_config.get(adapter_name)
    if fresh or config is None:
        placed = _with_places(self, kwargs)
        if placed is not kwargs:  # plain adapters are stored with the wrappers' names
            kwargs = placed if isinstance(config or PeftConfig.from_pretrained(folder), ProtectedConfig) else kwargs
        with deferred_folds():
            result = original(self, folder, adapter_name, *args, **kwargs)
        if isinstance(self.peft_config.get(adapter_name), ProtectedConfig):
            # with low_cpu_mem_usage the factors lie in the file's memory, or were rounded to the base's 16 bits
            known = None if args or kwargs.get("low_cpu_mem_usage") else Snapshot.of(Path(folder))
            lay_out_adapter(self, adapter_name, math.inf if known is None else known.worst_leak)
            fold_tables(self)
        for name, leaf in protected_leaves(self):  # PEFT's eval() in the block folded no other adapter either
            if not leaf.training and name.rpartition(".")[2] != adapter_name:
                leaf.fold()
        return result
    stored = PeftConfig.from_pretrained(folder)
    if type(stored) is not type(config):
        kinds = type(config).__name__, type(stored).__name__
        raise ConfigError(f"adapter {adapter_name!r} is a {kinds[0]}, {folder} holds a {kinds[1]}. {NEW_NAME}")
    check_ahead(self, stored)
    layers = adapter_layers(self, adapter_name)
    if config.freezes and stored._certificate is not None:
        take_over(config, stored, layers, adapter_name)
    elif stored._stored is None:
        raise ArtifactError(f"{folder} holds a config without an adapter. Give one that save_pretrained wrote.")
    else:
        _check_same(adapter_name, folder, stored, config, layers)
        check_scalings(folder, stored, config, layers, adapter_name)
        stored.subspace.check_fits({n: layer.get_base_layer() for n, layer in layers.items()}, config.basis_sides)
        config.subspace = stored.subspace
        remember(config, loaded=True)
        bind(layers, adapter_name, config)
    return original(self, folder, adapter_name, *args, **_with_places(self, kwargs))


def _with_places(model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """With PEFT's `key_mapping` from the base model's own names, as stored, to those that inner wrappers give."""
    names = {name: place.removeprefix(PREFIX) for name, place in places(model).items() if name}
    if all(name == place for name, place in names.items()):
        return kwargs
    longest_first = sorted(names, key=len, reverse=True)  # PEFT takes the first pattern that matches
    mapping = {rf"^{re.escape(name)}\.": names[name].replace("\\", r"\\") + "." for name in longest_first}
    return {**kwargs, "key_mapping": {**mapping, **(kwargs.get("key_mapping") or {})}}


def _check_same(adapter_name: str, source: str, stored: Any, config: Any, layers: Any) -> None:
    ranks = {name: rank for name, (_, _, rank) in stored._stored.shapes.items()}
    existing = {name: int(layer.r[adapter_name]) for name, layer in layers.items()}
    if stored.sides != config.sides:
        raise ArtifactError(
            f"{source} is constrained on sides {stored.sides}, {adapter_name!r} on {config.sides}. {NEW_NAME}"
        )
    names = sorted(ranks.keys() | existing.keys(), key=by_number)
    if differing := [name for name in names if ranks.get(name) != existing.get(name)]:
        one, other = (table.get(differing[0], "none") for table in (ranks, existing))
        raise ArtifactError(
            f"{source} has modules or ranks other than those of adapter {adapter_name!r}: rank {one} and {other} at "
            f"{differing[0]} ({len(differing)} of {len(names)} modules differ). {NEW_NAME}"
        )
    if stored._stored.residual != config.residual:
        both = " and ".join("with" if own else "without" for own in (stored._stored.residual, config.residual))
        raise ArtifactError(f"{source} and adapter {adapter_name!r} are {both} initial factors. {NEW_NAME}")
