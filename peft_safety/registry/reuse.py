"""What a config remembers of the adapter that was made from it, so that a second adapter from it is a copy, or starts
over from what the user asked for.
"""

from __future__ import annotations

import copy
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from peft_safety.core import files
from peft_safety.core.adapter_dir import StoredAdapter
from peft_safety.core.plain_lora import ADAPTER_FILE, PREFIX
from peft_safety.errors import ConfigError, SubspaceError
from peft_safety.layers import ProtectedLinear
from peft_safety.methods.base import ProtectedConfig

Initials = dict[str, tuple[Tensor, Tensor]]
"""The frozen factors `(A0, B0)` by module."""


@dataclass(frozen=True)
class Origin:
    """Where an adapter came from.

    Attributes:
        source: mark of the config that it was made from; a config with this mark and these settings makes a copy of
            it.
        asked: this package's fields as the user gave them: `subspace="auto"`, for one.
        made: the same once the adapter was made. Where one is another now, the config asks for another adapter.
        loaded: it came from a directory, which has its frozen factors but not the data behind them.
    """

    source: str
    asked: dict[str, Any]
    made: dict[str, Any]
    loaded: bool


def private(config: ProtectedConfig) -> ProtectedConfig:
    """A copy for one adapter. What injection finds out (subspace, module names) goes there, and the caller's own
    config stays what it was.
    """
    config._mark = config._mark or uuid.uuid4().hex
    own = copy.copy(config)
    for field in fields(LoraConfig):  # PEFT completes some of them in place
        value = getattr(own, field.name)
        if isinstance(value, (list, set, dict)):
            setattr(own, field.name, copy.copy(value))
    return own


def settings(config: ProtectedConfig) -> dict[str, Any]:
    """The fields that this package adds to LoRA's."""
    theirs = {field.name for field in fields(LoraConfig)} | {"safety_artifact"}
    return {field.name: getattr(config, field.name) for field in fields(config) if field.name not in theirs}


def is_copy(config: ProtectedConfig, configs: Mapping[str, Any]) -> bool:
    """Whether an adapter was made from this config, and it asks for the same one again. A user's own config takes over
    what was found out for that adapter.

    Args:
        configs: the model's, by adapter.
    """
    if config._origin is not None:
        return _equal(settings(config), config._origin.made)
    for there in configs.values():
        origin = getattr(there, "_origin", None)
        if (
            origin is not None
            and origin.source == config._mark
            and _equal(settings(config), origin.asked)
            and is_copy(there, {})
        ):
            for name, value in origin.made.items():
                setattr(config, name, value)
            config._origin = origin
            return True
    return False


def _equal(now: dict[str, Any], then: dict[str, Any]) -> bool:
    return now.keys() == then.keys() and all(_same(value, then[name]) for name, value in now.items())


def _same(one: Any, other: Any) -> bool:
    plain = (
        bool,
        int,
        float,
        str,
        type(None),
    )  # pickles keep the values of these, and the identity of everything else
    return one is other or (isinstance(one, plain) and type(one) is type(other) and one == other)


def start_over(config: ProtectedConfig) -> None:
    """Ask again for what the user asked for, where nobody has changed it since."""
    origin = config._origin
    for name, value in ({} if origin is None else origin.asked).items():
        if origin is not None and _same(getattr(config, name), origin.made[name]):
            setattr(config, name, value)


def remember(config: ProtectedConfig, asked: dict[str, Any] | None = None, *, loaded: bool = False) -> None:
    """Note that an adapter was made from this config, or filled from a directory.

    Args:
        asked: `settings` before, of a config that was new; None makes them those of now.
    """
    made = settings(config)
    new = config._origin is None and not loaded
    if not new:  # no longer the adapter that the mark stands for
        config._mark = uuid.uuid4().hex
    assert config._mark is not None
    config._origin = Origin(config._mark, made if asked is None else asked, made, loaded)


def sizes(layers: Mapping[str, LoraLayer], adapter_name: str) -> dict[str, tuple[int, float]]:
    """Rank and alpha of an adapter by module."""
    return {name: (int(layer.r[adapter_name]), layer.lora_alpha[adapter_name]) for name, layer in layers.items()}


def fits(config: ProtectedConfig, layers: Mapping[str, nn.Module]) -> bool:
    """Whether the subspace is of these base layers, but for those that it leaves out."""
    gone = set(config.subspace.lacking(layers, config.basis_sides)) & set(config.subspace.left_out)
    try:
        config.subspace.check_fits(
            {name: layer for name, layer in layers.items() if name not in gone}, config.basis_sides, bind=False
        )
    except SubspaceError:
        return False
    return True


def start(
    model: nn.Module,
    layers: Mapping[str, LoraLayer],
    name: str,
    config: ProtectedConfig,
    configs: Mapping[str, Any],
    copied: bool,
) -> None:
    """The first factors of a new adapter. Frozen ones are taken over, from the adapter that is copied or from the
    directory, and computed only for others.
    """
    known = _copied_factors(config, layers, name, configs) if copied and config.residual else None
    if known is None and config._stored is not None and config.residual:
        known = _stored_factors(layers, config._stored)
    for module, factors in (known or {}).items():
        for factor, initial in zip((layers[module].lora_A, layers[module].lora_B), factors, strict=True):
            _start_from(factor[name], initial)
    if known is None and config._stored is None and (config.residual or not copied):
        if config.residual:
            _check_data(config)
        config.initialize(model, layers, name)


def _stored_factors(layers: Mapping[str, LoraLayer], stored: StoredAdapter) -> Initials:
    """Frozen factors come with the directory, like the bases: transformers' loader, for one, loads parameters only."""
    with files.open_tensors(files.child(stored.directory, ADAPTER_FILE)) as handle:
        return {
            name: (
                handle.get_tensor(f"{PREFIX}{name}.lora_A.initial"),
                handle.get_tensor(f"{PREFIX}{name}.lora_B.initial"),
            )
            for name in layers
        }


def _copied_factors(
    config: ProtectedConfig, layers: Mapping[str, LoraLayer], name: str, configs: Mapping[str, Any]
) -> Initials | None:
    """`{module: (A0, B0)}` of the adapter that this config is a copy of, as they stand in the model; None if the model
    has none of these shapes.

    Args:
        layers: those of the new adapter `name`.
        configs: the model's, by adapter.
    """
    source = sibling(config, layers, name, configs)
    if source is None:
        return None
    return {module: (layer.lora_A[source].initial, layer.lora_B[source].initial) for module, layer in layers.items()}


def sibling(
    config: ProtectedConfig, layers: Mapping[str, LoraLayer], name: str, configs: Mapping[str, Any]
) -> str | None:
    """The adapter that the new one, `name`, is a copy of; None if the model has none of these shapes."""
    assert config._origin is not None
    for other, there in configs.items():
        origin = getattr(there, "_origin", None)
        if other == name or origin is None or origin.source != config._origin.source:
            continue
        if all(other in layer.lora_A and layer.r[other] == layer.r[name] for layer in layers.values()):
            return other
    return None


@torch.no_grad()
def _start_from(leaf: ProtectedLinear, initial: Tensor) -> None:
    """Give a fresh leaf the frozen factor `initial`, and start the trainable one there: the update is zero."""
    weight, there = leaf.raw(), leaf.initial
    assert there is not None
    if initial.is_meta or weight.is_meta:
        leaf.initial = (
            initial.detach().clone()
            if initial.is_meta
            else initial.detach().to(there.device, copy=True, memory_format=torch.contiguous_format)
        )
        return
    # a factor in the dtype of a half-precision base would round its frozen one at the first look, before PEFT makes it
    # fp32
    weight.data = initial.detach().to(
        device=weight.device,
        dtype=torch.promote_types(weight.dtype, initial.dtype),
        copy=True,
        memory_format=torch.contiguous_format,
    )
    leaf.initial = initial.detach().to(there.device, copy=True, memory_format=torch.contiguous_format)


def _check_data(config: ProtectedConfig) -> None:
    """Frozen factors of a loaded adapter cannot be computed again: the data behind them are not saved.

    Raises:
        ConfigError: this config came from a directory, and has no data of its own.
    """
    loaded = config.safety_artifact is not None if config._origin is None else config._origin.loaded
    if loaded and all(getattr(config, name) is None for name in config.UNSAVED):
        raise ConfigError(
            f"{type(config).__name__}: this config is of a saved adapter with a residual. Its initial factors are in "
            "that directory, the data behind them "
            "nowhere. Load the adapter, add the copy to the model that has it (with the same r), or give the config "
            "its data again."
        )
