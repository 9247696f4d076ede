"""Out of the package: a plain LoRA adapter that computes the same function."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn

from peft_safety import files, publish
from peft_safety.artifact import ADAPTER_FILE, CARD, MANIFEST, PREFIX
from peft_safety.errors import ConfigError, ProtectionError
from peft_safety.layers import joined, stored_factors
from peft_safety.layers.adapters import adapter_layers, config_table
from peft_safety.methods.base import ProtectedConfig
from peft_safety.names import pin, places
from peft_safety.projection import delta_leak, leak_tolerance
from peft_safety.registry.configs import stored_adapter
from peft_safety.registry.protection import assert_protected


def export_lora(model: nn.Module, directory: str | os.PathLike[str], adapter_name: str = "default") -> Path:
    """Write a protected adapter as plain LoRA: any PEFT, with or without this package, computes the same function from
    it.

    The scaling is folded into `lora_B`, so `lora_alpha = r`; module names are explicit and the rank is uniform (padded
    with zeros). An adapter with a residual
    has twice the rank: `A' = [A; A0]`, `B' = s [C B, -C B0]`.

    Args:
        model: a PeftModel, or a model with injected adapters.
        directory: created if missing; published atomically.

    Returns:
        The directory.

    Raises:
        ProtectionError: the adapter is not protected any more, or a written factor would leak.
        ConfigError: it also trained other weights (`modules_to_save`), which a plain LoRA cannot hold, or it is
            merged.
    """
    assert_protected(model, adapter_name)
    config: ProtectedConfig = config_table(model)[adapter_name]
    factors = {}
    for name, layer in adapter_layers(model, adapter_name).items():
        if adapter_name in layer.merged_adapters:
            raise ConfigError(
                f"adapter {adapter_name!r} is merged into the base weights. Call unmerge_adapter() first."
            )
        factors[name] = plain_factors(
            *stored_factors(layer.lora_A[adapter_name], layer.lora_B[adapter_name]), float(layer.scaling[adapter_name])
        )
    return _publish(Path(directory), factors, config, places(model))


def export_directory(source: str | os.PathLike[str], directory: str | os.PathLike[str]) -> Path:
    """`export_lora` for a saved adapter: from directory to directory, no model is built.

    Raises:
        PeftSafetyError: the source is not a whole protected adapter, or trained other weights too.
    """
    from peft import PeftConfig

    config: ProtectedConfig = PeftConfig.from_pretrained(os.fspath(source))
    stored = stored_adapter(source)
    factors = {}
    with files.open_tensors(stored.directory / ADAPTER_FILE) as handle:
        by_module = {key.removeprefix(PREFIX): key for key in handle.keys()}  # noqa: SIM118
        for name, (_, _, rank) in stored.shapes.items():
            alpha: Any = config._modules[name][1]
            scaling = alpha / (math.sqrt(rank) if config.use_rslora else rank)
            kinds = ("lora_A.weight", "lora_B.weight", "lora_A.initial", "lora_B.initial")
            found: list[Any] = [
                handle.get_tensor(by_module[f"{name}.{kind}"]) if f"{name}.{kind}" in by_module else None
                for kind in kinds
            ]
            factors[name] = plain_factors(*joined(*found), scaling)
    return _publish(Path(directory), factors, config)


@torch.no_grad()
def plain_factors(a: Tensor, b: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """`(A' (r', n), B' (m, r'))` on the CPU with `B' A' = dW`, the scaling included, from folded factors."""
    return a.detach().cpu().clone(), (b.detach().float() * scaling).to(b.dtype).cpu()


def plain_config(config: LoraConfig, rank: int, modules: Iterable[str]) -> LoraConfig:
    """Of a LoRA whose scaling is in its factors, over named modules."""
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(modules),
        task_type=config.task_type,
        inference_mode=True,
        fan_in_fan_out=config.fan_in_fan_out,
        base_model_name_or_path=config.base_model_name_or_path,
    )


def _publish(
    target: Path, factors: dict[str, tuple[Tensor, Tensor]], config: ProtectedConfig, there: Iterable[str] = ()
) -> Path:
    if config.modules_to_save or config.trainable_token_indices:
        raise ConfigError(
            "the adapter also trained modules_to_save or token rows; an exported LoRA holds factors only. Keep the "
            "native adapter."
        )
    rank = max(a.shape[0] for a, _ in factors.values())
    tensors: dict[str, Tensor] = {}
    for name, (a, b) in factors.items():
        _check(name, a, b, config)
        tensors[f"{PREFIX}{name}.lora_A.weight"] = nn.functional.pad(a, (0, 0, 0, rank - a.shape[0])).contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = nn.functional.pad(b, (0, rank - b.shape[1])).contiguous()
    plain = plain_config(config, rank, factors)
    pin(plain, dict.fromkeys(factors, (rank, rank)), {name: name for name in (*there, *factors)})
    with publish.publishing(target, MANIFEST) as staging:
        save_file(tensors, staging / ADAPTER_FILE, metadata={"format": "pt"})
        (staging / CARD).write_text(_card(config, rank, len(factors)), encoding="utf-8")
        plain.save_pretrained(str(staging))
    return target


def _check(name: str, a: Tensor, b: Tensor, config: ProtectedConfig) -> None:
    limit = leak_tolerance(b.dtype) * math.sqrt(a.shape[0])
    for side in config.sides:
        found = delta_leak(config.subspace.bases[name][side], a, b, side)
        if not found <= limit:
            raise ProtectionError(
                f"{name}: the exported update would reach {found:.2g} of its norm into the protected subspace (limit "
                f"{limit:.2g}). Keep the adapter in fp32."
            )


def _card(config: ProtectedConfig, rank: int, modules: int) -> str:
    facts = {k: v for k, v in config.subspace.provenance.items() if isinstance(v, (str, int, float)) and v != ""}
    rows = "\n".join(f"| {key} | {value} |" for key, value in sorted(facts.items()))
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

| subspace | |
|---|---|
{rows}
"""
