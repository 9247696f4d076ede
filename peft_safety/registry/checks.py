"""Does a stored adapter fit a model? Asked before anything is allocated."""

from __future__ import annotations

from collections.abc import Container, Sequence
from pathlib import Path

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from peft_safety.core import base_weights as weights
from peft_safety.core import files
from peft_safety.core.adapter_dir import base_key
from peft_safety.core.names import original, walk
from peft_safety.core.plain_lora import ADAPTER_FILE, read_plain
from peft_safety.errors import ArtifactError, ConfigError
from peft_safety.methods.base import ProtectedConfig


def check_ahead(model: nn.Module, config: ProtectedConfig) -> None:
    """Check, before anything is changed, that a stored adapter fits, and that some layer can have the rank."""
    modules = {name: original(module) for name, _, module in walk(model)}
    certificate = config._certificate
    if certificate is not None and config._snapshot is not None:
        extra = read_plain(config._snapshot.path).extra
        _check_extra(model, config, config._snapshot.path, tuple(extra), certificate.modules)
    if config._stored is None:
        widest = max((min(weights.shape(m)) for m in modules.values() if weights.supported(m)), default=config.r)
        if config.r > widest:
            raise ConfigError(f"r={config.r}, but no linear layer is wider than {widest}. Use a smaller r.")
        return
    for name, (m, n, rank) in config._stored.shapes.items():
        base = modules.get(name)
        shape = weights.shape(base) if base is not None and weights.supported(base) else None
        if shape != (m, n):
            existing = "no such module" if base is None else f"a {type(base).__name__} {shape or ''}".rstrip()
            raise ArtifactError(
                f"{config._stored.directory}: the adapter has {name} ({m} x {n}, rank {rank}), the model has "
                f"{existing}. Load the base model that it was trained on."
            )
    _check_extra(model, config, config._stored.directory, config._stored.extra_tensors, config._stored.shapes)


def _check_extra(
    model: nn.Module, config: ProtectedConfig, directory: Path, extra_tensors: Sequence[str], targets: Container[str]
) -> None:
    """Only `modules_to_save`, token rows and the model's embeddings may have tensors: no other weight is replaced."""
    saved = tuple(config.modules_to_save or ())
    if not saved and not extra_tensors:
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
    with files.open_tensors(directory / ADAPTER_FILE) as handle:
        shapes = {key: tuple(handle.get_slice(key).get_shape()) for key in extra_tensors}
    extra = {base_key(key, targets): shape for key, shape in shapes.items()}
    if config.trainable_token_indices:
        extra = {key: shape for key, shape in extra.items() if "token_adapter" not in key}
    mismatched = sorted(key for key in extra.keys() | needed if extra.get(key) != allowed.get(key))
    if mismatched:
        key = mismatched[0]
        raise ArtifactError(
            f"{directory}: {key} is {extra.get(key, 'missing')} in the adapter, and modules_to_save and the "
            f"model's embeddings account for {allowed.get(key, 'no such tensor')}: it would replace a base weight, or "
            "leave one untrained. Save the adapter again."
        )
