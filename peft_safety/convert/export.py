"""Export of a protected adapter as a plain LoRA adapter that computes the same function."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.nn.functional import pad

from peft_safety.convert.serving import check_server
from peft_safety.core.adapter_dir import check_adapter, protected_types
from peft_safety.core.certificate import FILE_NAME as CERTIFICATE
from peft_safety.core.certificate import read_certificate
from peft_safety.core.features import check_plain
from peft_safety.core.files import MAX_LISTING_BYTES, open_tensors, read_json
from peft_safety.core.names import places, walk
from peft_safety.core.plain_lora import (
    ADAPTER_FILE,
    MANIFEST,
    PREFIX,
    Factors,
    check_elsewhere,
    check_no_model,
    factor_tensors,
    plain_config,
    write_plain,
)
from peft_safety.core.projection import delta_leak, leak_tolerance
from peft_safety.core.snapshot import reading
from peft_safety.errors import ConfigError, ProtectionError
from peft_safety.layers.adapters import adapter_layers, config_table
from peft_safety.methods.base import ProtectedConfig
from peft_safety.methods.factors import layer_factors, protected_factors
from peft_safety.registry.configs import stored_config
from peft_safety.registry.frozen import check_certified, freezing
from peft_safety.registry.protection import check_adapters

EXPORTED = "peft_safety.exported"
"""Key of the mark in the header of an exported adapter's safetensors file."""


def export_lora(
    model: nn.Module, directory: str | os.PathLike[str], adapter_name: str = "default", server: str | None = None
) -> Path:
    """Write a protected adapter as plain LoRA, atomically. PEFT computes the same function from it without this
    package.

    The scaling is folded into `lora_B`, so `lora_alpha = r`. Module names are explicit. The rank is uniform (padded
    with zeros). An adapter with a residual has twice the rank: `A' = [A; A0]`, `B' = s [C B, -C B0]`. Modules in
    `modules_to_save`, such as the head of a classifier, are written beside the factors, as PEFT does. A frozen A keeps
    its certificate.

    Args:
        model: a PeftModel, or a model with injected adapters.
        directory: new, or of an earlier export, which is replaced.
        adapter_name: the protected adapter to write.
        server: "vllm", "sglang" or "llama.cpp": what that server does not take is refused before anything is written.

    Returns:
        The directory.

    Raises:
        ProtectionError: the adapter is not protected any more, or a written factor would leak.
        ConfigError: it also trained token rows, is merged into the base weights, or is none for the server; or the
            directory holds a protected adapter or a model.
    """
    check_adapters(model, adapter_name)
    layers = adapter_layers(model, adapter_name)
    factors = {name: layer_factors(name, layer, adapter_name) for name, layer in layers.items()}
    saved = dict(_saved_modules(model, adapter_name))
    return _publish(Path(directory), factors, config_table(model)[adapter_name], saved, server, places(model))


def _saved_modules(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, Tensor]]:
    """What an adapter trained in whole modules, under PEFT's keys."""
    for name, _, module in walk(model):
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            for key, tensor in module.modules_to_save[adapter_name].state_dict().items():
                yield f"{PREFIX}{name}.{key}", tensor.detach().cpu().clone()


def export_directory(
    source: str | os.PathLike[str], directory: str | os.PathLike[str], server: str | None = None
) -> Path:
    """`export_lora` for a saved adapter: from directory to directory, no model is built."""
    with reading(source, warn=True) as path:
        check_elsewhere(Path(source), directory)
        if (certificate := read_certificate(path)) is not None:
            plain = check_certified(path, certificate)
            check_plain(plain.config, str(source))
            plain.modules(path)  # every alpha is known
            config = freezing(certificate).from_certificate(plain.config, certificate)
            return _publish(Path(directory), plain.factors, config, plain.extra, server)
        stored = check_adapter(path)
        config = stored_config(stored)
        with open_tensors(path / ADAPTER_FILE) as handle:
            saved = {
                key: handle.get_tensor(key)
                for key in stored.extra_tensors
                if any(f".{name}." in f".{key}" for name in config.modules_to_save or ())
            }
        return _publish(Path(directory), protected_factors(stored, stored.shapes), config, saved, server)


def _publish(
    target: Path,
    factors: Mapping[str, Factors],
    config: ProtectedConfig,
    saved: Mapping[str, Tensor],
    server: str | None,
    modules: Iterable[str] = (),
) -> Path:
    """Check and write the plain adapter; `saved` are of `modules_to_save`, `modules` all modules of a model."""
    _check_target(target)
    if config.trainable_token_indices:
        raise ConfigError("the adapter also trained token rows (trainable_token_indices). Keep the native adapter.")
    rank = max(factor.a.shape[0] for factor in factors.values())
    grouped = [name for name, f in factors.items() if f.form.groups > 1 and f.a.shape[0] != rank]
    if grouped:
        raise ConfigError(f"{grouped[0]}: factors of a grouped convolution cannot be padded. Keep the native adapter.")
    unread = [name for name, factor in factors.items() if not factor.form.is_linear]
    if server is not None and unread:
        raise ConfigError(f"{unread[0]}: servers are not known to read factors other than linear layers'. Merge them.")
    if server is not None:
        check_server(server, factors, rank, saved, bool(config.fan_in_fan_out))
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for name, factor in factors.items():
        a, b = factor.scaled()
        limit = leak_tolerance(b.dtype) * math.sqrt(a.shape[0])
        for side in config.sides:
            share = delta_leak(config.subspace.bases[name][side], a, b, side)
            if not share <= limit:
                raise ProtectionError(
                    f"{name}: the exported update would reach {share:.2g} of its norm into the protected subspace "
                    f"(limit {limit:.2g}). Keep the adapter in fp32."
                )
        pairs[name] = pad(a, (0, 0, 0, rank - len(a))), pad(b, (0, rank - len(a)))
    plain = plain_config(pairs, vars(config), {name: name for name in (*modules, *factors)})
    plain.modules_to_save = config.modules_to_save
    card = _card(config, rank, len(factors), sorted(saved))
    certificate = config._certificate if config.freezes else None
    more = None if certificate is None else certificate.write
    write_plain(target, {**factor_tensors(pairs, factors), **saved}, plain, card, {EXPORTED: True}, more)
    return target


def _check_target(target: Path) -> None:
    """A ConfigError refuses to replace a protected adapter, or to write into a model's directory. An export may be
    replaced, also one with a certificate.
    """
    check_no_model(target)
    manifest, file = target / MANIFEST, target / ADAPTER_FILE
    if not manifest.is_file():
        return
    protected = read_json(manifest, MAX_LISTING_BYTES).get("peft_type") in protected_types()
    if not protected and os.path.lexists(target / CERTIFICATE) and file.is_file():
        with open_tensors(file) as handle:
            protected = EXPORTED not in (handle.metadata() or {})
    if protected:
        raise ConfigError(f"{target} holds a protected adapter, which this would replace. Give another directory.")


def _card(config: ProtectedConfig, rank: int, modules: int, saved: Sequence[str]) -> str:
    provenance = {"subspace": config.subspace_id} if config.subspace is None else config.subspace.provenance
    facts = {k: v for k, v in provenance.items() if isinstance(v, (str, int, float)) and v != ""}
    rows = "\n".join(f"| {key} | {value} |" for key, value in sorted(facts.items()))
    whole = ", ".join(sorted({key.removeprefix(PREFIX).rpartition(".")[0] for key in saved}))
    unconstrained = f"\nIt also holds modules that were trained without a constraint: {whole}.\n" if whole else ""
    base = config.base_model_name_or_path or "see training logs"
    return f"""---
library_name: peft
tags: [lora, safety, peft-safety]
---
# Exported {type(config).__name__.removesuffix("Config")} adapter

A plain LoRA adapter of rank {rank} over {modules} modules of `{base}`. It was trained under a safety constraint and
exported by peft-safety; it computes the same function as the protected adapter, and needs no other package than PEFT.
The update has no component in the protected subspace. What that does to a model's behavior is
not part of this guarantee: measure it.
{unconstrained}
| subspace | |
|---|---|
{rows}
"""
