"""Does a stored adapter fit a model? Asked before anything is allocated."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from peft_safety.core import base_weights as weights
from peft_safety.core import files
from peft_safety.core.adapter_dir import base_key
from peft_safety.core.factor_forms import Form
from peft_safety.core.names import original, walk
from peft_safety.core.plain_lora import ADAPTER_FILE, extra_keys
from peft_safety.errors import ArtifactError
from peft_safety.methods.base import ProtectedConfig


def check_ahead(model: nn.Module, config: ProtectedConfig) -> None:
    """Check, before anything is changed, that a stored adapter fits."""
    modules = {name: original(module) for name, _, module in walk(model)}
    certificate = config._certificate
    if certificate is not None and config._snapshot is not None:
        extra = extra_keys(config._snapshot.path / ADAPTER_FILE)  # checked when the config was read
        _check_extra(model, config, config._snapshot.path, extra, certificate.modules)
    if config._stored is None:
        return
    for name, (m, n, rank) in config._stored.shapes.items():
        base = modules.get(name)
        shape = _shape(base)
        if shape != (m, n):
            existing = "no such module" if base is None else f"a {type(base).__name__} {shape or ''}".rstrip()
            raise ArtifactError(
                f"{config._stored.directory}: the adapter has {name} ({m} x {n}, rank {rank}), the model has "
                f"{existing}. Load the base model that it was trained on."
            )
        if Form.of(base) != config._stored.forms[name]:
            raise ArtifactError(
                f"{config._stored.directory}: the factors of {name} are not those of a {type(base).__name__}. Load "
                "the base model that it was trained on."
            )
    _check_extra(model, config, config._stored.directory, config._stored.extra_tensors, config._stored.shapes)


def _shape(module: nn.Module | None) -> tuple[int, int] | None:
    """`(out_features, in_features)` of a module that can hold a protected adapter."""
    if module is None or not (weights.supported(module) or weights.quantization(module)):
        return None
    return weights.shape(module)


def _check_extra(
    model: nn.Module, config: ProtectedConfig, directory: Path, extra_tensors: Sequence[str], targets: Container[str]
) -> None:
    """Only `modules_to_save`, token rows and the model's embeddings may have tensors: no other weight is replaced."""
    saved = tuple(config.modules_to_save or ())
    if not saved and not extra_tensors and not config.trainable_token_indices:
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
    } | _token_rows(directory, config, modules, ends[:1])
    needed = set(allowed)
    own: dict[str, Tensor] = {}
    for name, module in modules.items():
        if any(module is end for end in ends):
            own |= {f"{name}.{k}": v for k, v in module.state_dict().items()}
    allowed |= {key: tuple(v.shape) for key, v in own.items()}
    tied = (
        config.ensure_weight_tying and len({id(getattr(end, "weight", end)) for end in ends}) == 1
    )  # PEFT wraps both ends
    named = needed | own.keys() if tied and needed & own.keys() else needed
    with files.open_tensors(directory / ADAPTER_FILE) as handle:
        extra = {base_key(key, targets): tuple(handle.get_slice(key).get_shape()) for key in extra_tensors}
        mismatched = sorted(key for key in extra.keys() | needed if extra.get(key) != allowed.get(key))
        if mismatched:
            key = mismatched[0]
            raise ArtifactError(
                f"{directory}: {key} is {extra.get(key, 'missing')} in the adapter, and modules_to_save and the "
                f"model's embeddings account for {allowed.get(key, 'no such tensor')}: it would replace a base weight "
                "or leave one untrained. Save the adapter again."
            )
        for stored in extra_tensors:
            key = base_key(stored, targets)
            if key not in named and not _equal(handle.get_tensor(stored), own[key]):
                raise ArtifactError(
                    f"{directory}: {key} {extra[key]} would replace the model's own, and the config does not name it. "
                    "Name it in modules_to_save when the adapter is trained, or save with save_embedding_layers=False."
                )


def _token_rows(
    directory: Path, config: ProtectedConfig, modules: Mapping[str, nn.Module], embeddings: Sequence[nn.Module | None]
) -> dict[str, tuple[int, ...]]:
    """The keys and shapes of the trained token rows that a config names."""
    rows: Any = config.trainable_token_indices or {}
    table = (
        rows if isinstance(rows, dict) else {n: rows for n, m in modules.items() if any(m is e for e in embeddings)}
    )
    result: dict[str, tuple[int, ...]] = {}
    for end, indices in table.items():
        for name in (name for name in modules if name.endswith(end)):
            shape = tuple(getattr(modules[name], "weight", torch.empty(0)).shape)
            known = len(shape) == 2 and isinstance(indices, list)
            if not known or not all(type(i) is int and 0 <= i < shape[0] for i in indices):
                what = f"trainable_token_indices={str(rows)[:80]} are no rows of {name} {shape}"
                raise ArtifactError(f"{directory}: {what}. Load the base model that it was trained on.")
            result[f"{name}.token_adapter.trainable_tokens_delta"] = (len(indices), shape[1])
    return result


def _equal(stored: Tensor, own: Tensor) -> bool:
    """Whether a stored weight is the model's own, in the coarser of the two dtypes."""
    dtype = min(stored.dtype, own.dtype, key=lambda dtype: dtype.itemsize)
    return torch.equal(stored.to(dtype), own.detach().cpu().to(dtype))
