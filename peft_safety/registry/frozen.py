"""Adapters whose `lora_A` is made blind once and then frozen: their factors, and the certificate of a directory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from peft_safety.core import kinds
from peft_safety.core.adapter_dir import are_names
from peft_safety.core.base_weights import is_whole, precision, shape, split_dimension
from peft_safety.core.certificate import FILE_NAME, Certificate, FrozenFactor, certified_factor, read_certificate
from peft_safety.core.factor_forms import Form
from peft_safety.core.features import WITH_FROZEN_A
from peft_safety.core.names import by_number, pin
from peft_safety.core.parameters import bases_of
from peft_safety.core.plain_lora import PlainLoRA, read_plain
from peft_safety.core.projection import leak_tolerance
from peft_safety.core.snapshot import Snapshot, reading
from peft_safety.errors import ArtifactError, ConfigError, UnsupportedLayerError
from peft_safety.layers.adapters import adapter_layers, config_table, weights_of
from peft_safety.layers.factor_table import freeze_table
from peft_safety.layers.frozen_linear import freeze
from peft_safety.methods.base import ProtectedConfig
from peft_safety.registry import reuse
from peft_safety.registry.lora_layers import adopt
from peft_safety.registry.reuse import Layers
from peft_safety.registry.types import config_types

SPAN_TOLERANCE = 1e-6
"""Singular values of joined factors below this share of the largest are rounding."""


def start(model: nn.Module, layers: Layers, adapter_name: str, config: ProtectedConfig) -> None:
    """Make the factors of a new adapter, whose config has its subspace, and freeze them."""
    rows = _of_all_experts(config.frozen_rows(model, layers, adapter_name), layers)
    for name, layer in layers.items():
        base = layer.get_base_layer()
        if split_dimension(base) is not None:  # one A for all, which each process holds whole
            group = base.weight.device_mesh.get_group("tp")  # type: ignore[union-attr, operator]
            rows[name] = rows[name].to(base.weight.device).contiguous()  # type: ignore[arg-type]
            torch.distributed.broadcast(rows[name], torch.distributed.get_global_rank(group, 0), group=group)
    config._certificate = _certificate(config, rows, bases_of(layers))
    _install(layers, adapter_name, rows, config)


def reuse_factors(layers: Layers, adapter_name: str, config: ProtectedConfig, configs: Mapping[str, Any]) -> bool:
    """Freeze factors that exist already and need no bases: those of the copied adapter, or of the config's directory.
    PEFT fills those of a weighted combination later (`combined`). Returns whether there are any.
    """
    if not config._combined:
        source = reuse.sibling(config, layers, adapter_name, configs) if reuse.is_copy(config, configs) else None
        if source is not None:
            config._certificate = configs[source]._certificate
            rows = {name: weights_of(layer, source)[0].detach().flatten(1) for name, layer in layers.items()}
        elif config._certificate is not None and config._certificate.directory is not None:
            folder = config._certificate.directory if config._snapshot is None else config._snapshot.path
            with reading(folder) as path:
                rows = check_certified(path, config._certificate, layers, adapter_name).rows
        else:
            return False
        _install(layers, adapter_name, rows, config)
        reuse.remember(config, loaded=True)
    config._modules = reuse.sizes(layers, adapter_name)
    return True


def _of_all_experts(rows: Mapping[str, Tensor], layers: Layers) -> dict[str, Tensor]:
    """The rows, in a layer of fused experts once for each: PEFT has them one expert after the other."""
    return {name: a.repeat(getattr(layers[name], "num_experts", 1), 1) for name, a in rows.items()}


@torch.no_grad()
def _install(
    layers: Layers, adapter_name: str, rows: Mapping[str, Tensor], new: ProtectedConfig | None = None
) -> None:
    """Freeze factors. `new`: the config of an adapter that was just built."""
    for name, layer in layers.items():
        adopt(layer)
        if not kinds.is_embedding(layer.get_base_layer()):
            freeze(layer, adapter_name, rows[name])
            continue
        freeze_table(layer, adapter_name, rows[name])
        if new is not None and new.init_lora_weights is not False:
            weights_of(layer, adapter_name)[1].zero_()  # on embeddings PEFT starts at A = 0, and B is random


@torch.no_grad()
def set_task_directions(model: nn.Module, task_data: Any, adapter_name: str = "default") -> None:
    """Compute the frozen factors of an adapter again from rows of its task (`task_data` as in `GuardSpaceConfig`). All
    processes take those of rank 0, so each of them must call it. A loaded adapter lacks the subspace for it.
    """
    config = config_table(model).get(adapter_name)
    if not isinstance(config, ProtectedConfig) or not config.freezes or config.subspace is None:
        raise ConfigError(f"adapter {adapter_name!r} has no frozen factor. Give its config task_data, or train='B'.")
    layers = adapter_layers(model, adapter_name)
    base = bases_of(layers)
    for name, layer in layers.items():
        pair = weights_of(layer, adapter_name)
        if not all(is_whole(weight) and weight.ndim >= 2 for weight in pair):
            raise UnsupportedLayerError(f"{name}: its factors are sharded. Give the config task_data before that.")
        if bool(pair[1].any()):
            raise ConfigError(f"{name}: adapter {adapter_name!r} has learned something. Do it before the first step.")
    kept, config.subspace = config.subspace, config.resolve(model, base)
    try:
        rows = _of_all_experts(config.frozen_rows(model, layers, adapter_name, task_data), layers)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for name, a in rows.items():
                rows[name] = a.to(weights_of(layers[name], adapter_name)[1].device)
                torch.distributed.broadcast(rows[name], 0)
        config._certificate = _certificate(config, rows, base)
    finally:
        config.subspace = kept
    reuse.amend(config)
    _install(layers, adapter_name, rows)


def _certificate(config: ProtectedConfig, rows: Mapping[str, Tensor], base: Mapping[str, nn.Module]) -> Certificate:
    modules = {name: certified_factor(a, config.subspace.bases[name]["in"]) for name, a in rows.items()}
    own = {name: value for name, value in reuse.settings(config).items() if name != "subspace"}
    settings = {name: value for name, value in own.items() if isinstance(value, (str, int, float))}
    settings["precision"] = precision(base)
    if config.unconstrained:
        settings["unconstrained"] = config.unconstrained
    return Certificate(config.PEFT_KEY, config.subspace.restricted(rows).digest, settings, modules)


def _expected(layer: Any, adapter_name: str) -> tuple[Any, ...]:
    """Rows, inputs and form of a layer's `lora_A`."""
    base = layer.get_base_layer()
    features = layer.in_features if kinds.shape(base) is None else shape(base)[1]
    return int(layer.r[adapter_name]) * getattr(layer, "num_experts", 1), int(features), Form.of(base)


def _named(expected: tuple[Any, ...] | None) -> str:
    """What `_expected` has found, in an error."""
    if expected is None:
        return "none"
    *shape, form = expected
    kind = "" if form.is_linear else " of an embedding" if form.embedding else f" of a convolution {form.patch}"
    return f"{tuple(shape)}{kind}"


def check_certified(
    directory: Path, certificate: Certificate, layers: Layers | None = None, adapter_name: str = ""
) -> PlainLoRA:
    """A directory whose `lora_A` factors are its certificate's, and fit `layers`; others are refused."""
    plain = read_plain(directory, WITH_FROZEN_A, warn=False, linear=False)
    rows = plain.rows
    if layers is not None:
        shapes = {name: (*map(int, a.shape), plain.factors[name].form) for name, a in rows.items()}
        expected = {name: _expected(layer, adapter_name) for name, layer in layers.items()}
        names = sorted(shapes.keys() | expected.keys(), key=by_number)
        if differing := [name for name in names if shapes.get(name) != expected.get(name)]:
            stored, own = (_named(table.get(differing[0])) for table in (shapes, expected))
            raise ArtifactError(
                f"{directory}: its lora_A factors are not those of the model's layers: {differing[0]} has {stored} in "
                f"the adapter and {own} in the model ({len(differing)} of {len(names)} modules differ). Load the base "
                "model that it was trained on."
            )
    if differing := sorted(set(rows) ^ set(certificate.modules)):
        counts = f"{len(rows)} modules, but {FILE_NAME} has {len(certificate.modules)}"
        raise ArtifactError(f"{directory}: {counts}; they differ at {differing[:3]}. Save the adapter again.")
    for name, a in rows.items():
        if certificate.modules[name].precision(a) is None:
            raise ArtifactError(
                f"{directory}: lora_A {tuple(a.shape)} of {name} is not the one in {FILE_NAME}: it was changed "
                "elsewhere, and may see the protected inputs. Make it blind again with peft-safety repair --method "
                f"guardspace; without {FILE_NAME} it loads as an ordinary LoRA."
            )
    return plain


def certified(config: LoraConfig, snapshot: Snapshot) -> LoraConfig:
    """The protected config of a plain LoRA directory with a certificate; without one, the plain config itself."""
    certificate = read_certificate(snapshot.path)
    if certificate is None:
        return config
    plain = check_certified(snapshot.path, certificate)
    if not are_names(config.modules_to_save or ()):
        raise ArtifactError(f"{snapshot.path}: modules_to_save must list module names. Save the adapter again.")
    patterns = (config.target_modules, config.exclude_modules, config.layers_pattern)
    given = [x for value in patterns for x in ([value] if isinstance(value, str) else value or ())]
    if not are_names([*given, *(config.rank_pattern or ()), *(config.alpha_pattern or ())]):
        pin(config, plain.modules(snapshot.path))  # no regular expression of a directory is run
    source = replace(certificate, directory=snapshot.source.resolve())
    result: LoraConfig = freezing(certificate).from_certificate(config, source)
    return result


def freezing(certificate: Certificate) -> Any:
    """The config class of a certificate's method. An ArtifactError says that it freezes no factor."""
    cls = config_types().get(certificate.method)
    if not hasattr(cls, "from_certificate"):
        where = (certificate.directory or Path()) / FILE_NAME
        raise ArtifactError(f"{where}: method {certificate.method!r} freezes no factor. Save the adapter again.")
    return cls


def take_over(config: ProtectedConfig, stored: ProtectedConfig, layers: Layers, name: str) -> None:
    """Give an existing adapter the frozen factors of a checked directory (a resumed run)."""
    certificate = stored._certificate
    assert certificate is not None
    assert certificate.directory is not None
    if config.subspace_id != stored.subspace_id:
        raise ConfigError(f"{certificate.directory} avoids another null space than adapter {name!r}. {reuse.NEW_NAME}")
    with reading(certificate.directory if stored._snapshot is None else stored._snapshot.path) as path:
        rows = check_certified(path, certificate, layers, name).rows
    reuse.check_scalings(certificate.directory, stored, config, layers, name)
    config._certificate = certificate
    _install(layers, name, rows)


@torch.no_grad()
def combined(layers: Layers, adapter_name: str, configs: Mapping[str, Any], sources: list[str]) -> None:
    """Freeze a weighted combination, projected onto the span of the sources' rows: pruned single elements leave it."""
    first, *others = (configs[source]._certificate for source in sources)
    agreed = {k: v for k, v in first.settings.items() if all(o.settings.get(k) == v for o in others)}
    rows, modules = {}, {}
    for name, layer in layers.items():
        parts = {source: weights_of(layer, source)[0].detach().flatten(1) for source in sources}
        known = {source: configs[source]._certificate.modules[name] for source in sources}
        _, s, vh = torch.linalg.svd(torch.cat(list(parts.values())).double(), full_matrices=False)
        span = vh[s > SPAN_TOLERANCE * s[0]]
        rows[name] = (weights_of(layer, adapter_name)[0].detach().flatten(1).double() @ span.mT @ span).float()
        dtypes = [known[source].precision(part) or part.dtype for source, part in parts.items()]
        worst = max(*(entry.leak for entry in known.values()), *(leak_tolerance(dtype) for dtype in dtypes))
        modules[name] = FrozenFactor.of(rows[name], known[sources[0]].k, worst)
    configs[adapter_name]._certificate = replace(first, settings=agreed, modules=modules, directory=None)
    _install(layers, adapter_name, rows)
