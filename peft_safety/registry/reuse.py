"""A second adapter from a config that already made one: a copy of that adapter, or a new one from the user's settings.

Where the parts of a new adapter come from:

    new       bases: `config.resolve`                 factors: PEFT's, or computed by the method (`initialize`)
    copy      bases: the config's, already resolved   frozen factors: those of the copied adapter, in the model
    stored    bases: the directory's                  frozen factors: the directory's
    combined  `add_weighted_adapter` copies a config and fills the factors
"""

from __future__ import annotations

import copy
import math
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from peft_safety.core import files
from peft_safety.core.names import by_number, pattern_value
from peft_safety.core.parameters import stored_name
from peft_safety.core.plain_lora import ADAPTER_FILE, PREFIX, scaling_of
from peft_safety.errors import ArtifactError, ConfigError, SubspaceError
from peft_safety.layers import ProtectedLinear
from peft_safety.layers.adapters import tables
from peft_safety.methods.base import ProtectedConfig

NEW_NAME = "Load it under a new name."
"""Remedy where an existing adapter cannot become another one."""
Layers = Mapping[str, LoraLayer]
"""The layers of an adapter by the module's name."""


@dataclass(frozen=True)
class Origin:
    """Where an adapter came from: the mark of its config, this package's fields as the user gave them (`asked`) and
    after the adapter was made (`made`), and whether it was `loaded`: then the data behind its frozen factors are
    missing.
    """

    source: str
    asked: dict[str, Any]
    made: dict[str, Any]
    loaded: bool


def private(config: ProtectedConfig) -> ProtectedConfig:
    """A copy for one adapter: injection writes its results (subspace, module names) there, not into the user's."""
    config._mark = config._mark or uuid.uuid4().hex
    own = copy.copy(config)
    for field in fields(LoraConfig):  # PEFT completes some of them in place
        value = getattr(own, field.name)
        if isinstance(value, (list, set, dict)):
            setattr(own, field.name, copy.copy(value))
    return own


def settings(config: ProtectedConfig) -> dict[str, Any]:
    """The fields that this package adds to LoRA's, and that say what the adapter is."""
    theirs = {field.name for field in fields(LoraConfig)} | {"safety_artifact", "fused"}
    return {field.name: getattr(config, field.name) for field in fields(config) if field.name not in theirs}


def is_copy(config: ProtectedConfig, configs: Mapping[str, Any]) -> bool:
    """Whether an adapter was made from this config, and it asks for the same one again. A user's own config then takes
    over the results of that adapter, which is among the model's `configs`.
    """
    if config._origin is not None:
        return _equal(settings(config), config._origin.made)
    for other in configs.values():
        origin = getattr(other, "_origin", None)
        if origin is None or origin.source != config._mark or not _equal(settings(config), origin.asked):
            continue
        if is_copy(other, {}):
            for name, value in origin.made.items():
                setattr(config, name, value)
            config._origin = origin
            return True
    return False


def _equal(now: dict[str, Any], then: dict[str, Any]) -> bool:
    return now.keys() == then.keys() and all(_same(value, then[name]) for name, value in now.items())


def _same(one: Any, other: Any) -> bool:
    # pickles keep the values of these types, and the identity of everything else
    plain = (bool, int, float, str, type(None))
    return one is other or (isinstance(one, plain) and type(one) is type(other) and one == other)


def start_over(config: ProtectedConfig) -> None:
    """Restore what the user asked for, in the fields that nobody has changed since."""
    if config._origin is not None:
        for name, value in config._origin.asked.items():
            if _same(getattr(config, name), config._origin.made[name]):
                setattr(config, name, value)


def remember(config: ProtectedConfig, asked: dict[str, Any] | None = None, *, loaded: bool = False) -> None:
    """Note that an adapter was made from this config, or loaded. `asked`: its `settings` before, if they differ."""
    made = settings(config)
    new = config._origin is None and not loaded
    if not new:  # no longer the adapter that the mark stands for
        config._mark = uuid.uuid4().hex
    assert config._mark is not None
    config._origin = Origin(config._mark, made if asked is None else asked, made, loaded)


def amend(config: ProtectedConfig) -> None:
    """Note that the adapter of this config was made anew, by settings that changed: its copies are still copies."""
    if config._origin is not None:
        config._origin = replace(config._origin, made=settings(config))


def sizes(layers: Layers, adapter_name: str) -> dict[str, tuple[int, float]]:
    return {name: (int(layer.r[adapter_name]), layer.lora_alpha[adapter_name]) for name, layer in layers.items()}


def rescale(layers: Layers, adapter_name: str, config: ProtectedConfig) -> dict[str, tuple[int, float]]:
    """Give the layers of a hot-swapped adapter the scalings that its config says: PEFT's swap reads no pattern.
    Returns the config's ranks and alphas.
    """
    said = config._modules or {name: _said(config, name) for name in layers}
    for name, layer in layers.items():
        rank, alpha = said[name] if name in said else _said(config, name)
        scaling = scaling_of(alpha, rank, vars(config))
        if isinstance(layer.scaling[adapter_name], Tensor):  # compiled graphs read it
            layer.scaling[adapter_name].fill_(scaling)
        else:
            layer.scaling[adapter_name] = scaling
    return said


def _said(config: ProtectedConfig, name: str) -> tuple[int, float]:
    tables: Any = ((config.rank_pattern, config.r), (config.alpha_pattern, config.lora_alpha))
    rank, alpha = (table.get(get_pattern_key(table.keys(), name), usual) for table, usual in tables)
    return rank, alpha


def resize(layers: Layers, adapter_name: str, config: ProtectedConfig) -> None:
    """Set the ranks and alphas of the layers by the factors, which PEFT has swapped or padded, and the scalings."""
    for layer in layers.values():
        leaf = tables(layer)[0][adapter_name]
        weight = leaf.raw() if isinstance(leaf, ProtectedLinear) else leaf.weight
        rank = int(weight.shape[0]) // getattr(layer, "num_experts", 1)
        alpha = float(layer.scaling[adapter_name]) * (math.sqrt(rank) if config.use_rslora else rank)
        layer.r[adapter_name] = rank
        layer.lora_alpha[adapter_name] = round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-6) else alpha


def check_scalings(
    source: object, stored: ProtectedConfig, config: ProtectedConfig, layers: Layers, adapter_name: str
) -> None:
    """An ArtifactError refuses to load factors onto an existing adapter that would scale their product otherwise."""
    differing = {}
    for name, layer in layers.items():
        key, rank = stored_name(name, config._parameters.get(name)), int(layer.r[adapter_name])
        alpha = pattern_value(stored.alpha_pattern, key, stored.lora_alpha)
        theirs = scaling_of(math.nan if alpha is None else alpha, rank, vars(stored))
        own = scaling_of(layer.lora_alpha[adapter_name], rank, vars(config))
        if not math.isclose(theirs, own, rel_tol=1e-6):
            differing[name] = f"{theirs:g} and {own:g}"
    if differing:
        first = min(differing, key=by_number)
        raise ArtifactError(
            f"{source} and adapter {adapter_name!r} have other alphas: they scale the update of {first} by "
            f"{differing[first]} ({len(differing)} of {len(layers)} modules differ). {NEW_NAME}"
        )


def fits(config: ProtectedConfig, layers: Mapping[str, nn.Module]) -> bool:
    """Whether the subspace is of these base layers, except for those that it leaves out."""
    left_out = set(config.subspace.lacking(layers, config.basis_sides)) & set(config.subspace.left_out)
    kept = {name: layer for name, layer in layers.items() if name not in left_out}
    try:
        config.subspace.check_fits(kept, config.basis_sides, bind=False)
    except SubspaceError:
        return False
    return True


def start(
    model: nn.Module, layers: Layers, name: str, config: ProtectedConfig, configs: Mapping[str, Any], copied: bool
) -> None:
    """Set the first factors of the new adapter `name`. Frozen ones of a residual come from the adapter that is copied
    or from the directory (transformers' loader loads parameters only), and are computed otherwise.
    """
    source = sibling(config, layers, name, configs) if copied and config.residual else None
    factors = [(f"{PREFIX}{m}.lora_{k}", f) for m, x in layers.items() for k, f in (("A", x.lora_A), ("B", x.lora_B))]
    if source is not None:
        for _, factor in factors:
            _start_from(factor[name], factor[source].initial)
    elif config._stored is not None and config.residual:
        with files.open_tensors(files.child(config._stored.directory, ADAPTER_FILE)) as handle:
            for key, factor in factors:
                _start_from(factor[name], handle.get_tensor(f"{key}.initial"))
    elif config._stored is None:
        if config.residual:
            _check_data(config)
        config.initialize(model, layers, name)


def sibling(config: ProtectedConfig, layers: Layers, name: str, configs: Mapping[str, Any]) -> str | None:
    """The adapter that the new one, `name`, is a copy of; None if the model has none of these shapes."""
    assert config._origin is not None
    for other, existing in configs.items():
        origin = getattr(existing, "_origin", None)
        if other == name or origin is None or origin.source != config._origin.source:
            continue
        if all(other in tables(layer)[0] and layer.r[other] == layer.r[name] for layer in layers.values()):
            return other
    return None


@torch.no_grad()
def _start_from(leaf: ProtectedLinear, initial: Tensor) -> None:
    """Give a new leaf a copy of the frozen factor, and the trainable one the same values: the update is zero."""
    weight, initial = leaf.raw(), initial.detach()
    assert leaf.initial is not None
    layout: Any = {"copy": True, "memory_format": torch.contiguous_format}
    leaf.initial = initial.to(initial.device if initial.is_meta else leaf.initial.device, **layout)
    if not (initial.is_meta or weight.is_meta):
        # in a half-precision base's own dtype the factor would be rounded, before PEFT makes it fp32
        dtype = torch.promote_types(weight.dtype, initial.dtype)
        weight.data = initial.to(device=weight.device, dtype=dtype, **layout)


def _check_data(config: ProtectedConfig) -> None:
    """Refuse a config of a saved adapter without data of its own: its frozen factors cannot be computed again."""
    loaded = config.safety_artifact is not None if config._origin is None else config._origin.loaded
    if loaded and all(getattr(config, name) is None for name in config.UNSAVED):
        raise ConfigError(
            "the directory of a saved adapter with a residual has its initial factors, but not the data for new ones. "
            "Load the adapter and add the copy to that model (with the same r), or give the config its data again."
        )
