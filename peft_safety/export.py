"""Out of the package: a plain LoRA adapter that computes the same function, and merging into a dequantised base."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from peft_safety import files, weights
from peft_safety.artifact import ADAPTER_FILE, CARD, MANIFEST, PREFIX
from peft_safety.errors import ConfigError, ProtectionError
from peft_safety.methods.protected import ProtectedConfig, adapter_layers, assert_protected, config_table, stored_adapter
from peft_safety.projection import delta_leak, leak_tolerance


def export_lora(model: nn.Module, directory: str | os.PathLike[str], adapter_name: str = "default") -> Path:
    """Write a protected adapter as plain LoRA: any PEFT, with or without this package, computes the same function from it.

    The scaling is folded into `lora_B`, so `lora_alpha = r`; module names are explicit and the rank is uniform (padded with zeros). An adapter with a residual
    has twice the rank: `A' = [A; A0]`, `B' = s [C B, -C B0]`.

    Args:
        model: a PeftModel, or a model with injected adapters.
        directory: created if missing; published atomically.

    Returns:
        The directory.

    Raises:
        ProtectionError: the adapter is not protected any more, or a written factor would leak.
        ConfigError: it also trained other weights (`modules_to_save`), which a plain LoRA cannot hold, or it is merged.
    """
    assert_protected(model, adapter_name)
    config: ProtectedConfig = config_table(model)[adapter_name]
    factors = {}
    for name, layer in adapter_layers(model, adapter_name).items():
        if adapter_name in layer.merged_adapters:
            raise ConfigError(f"adapter {adapter_name!r} is merged into the base weights. Call unmerge_adapter() first.")
        leaf_a, leaf_b = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
        a, b = leaf_a.weight, leaf_b.weight  # reading folds, the frozen factors too
        frozen = (getattr(leaf_a, "initial", None), getattr(leaf_b, "initial", None))
        factors[name] = plain_factors(a, b, *frozen, scaling=float(layer.scaling[adapter_name]))
    return _publish(Path(directory), factors, config)


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
            alpha: Any = (config.alpha_pattern or {}).get(name, config.lora_alpha)
            scaling = alpha / (math.sqrt(rank) if config.use_rslora else rank)
            kinds = ("lora_A.weight", "lora_B.weight", "lora_A.initial", "lora_B.initial")
            found: list[Any] = [handle.get_tensor(by_module[f"{name}.{kind}"]) if f"{name}.{kind}" in by_module else None for kind in kinds]
            factors[name] = plain_factors(*found, scaling=scaling)
    return _publish(Path(directory), factors, config)


@torch.no_grad()
def plain_factors(a: Tensor, b: Tensor, a0: Tensor | None, b0: Tensor | None, *, scaling: float) -> tuple[Tensor, Tensor]:
    """`(A' (r', n), B' (m, r'))` on the CPU with `B' A' = dW` exactly as the layer computes it, the scaling included.

    Args:
        a, b: folded factors, `(r, n)` and `(m, r)`.
        a0, b0: frozen initial factors of a residual, or None.
    """
    if a0 is not None and b0 is not None:
        a, b = torch.cat([a, a0.to(a)]), torch.cat([b, -b0.to(b)], dim=1)
    return a.detach().cpu().clone(), (b.detach().float() * scaling).to(b.dtype).cpu()


def _publish(target: Path, factors: dict[str, tuple[Tensor, Tensor]], config: ProtectedConfig) -> Path:
    if config.modules_to_save or config.trainable_token_indices:
        raise ConfigError("the adapter also trained modules_to_save or token rows; an exported LoRA holds factors only. Keep the native adapter.")
    rank = max(a.shape[0] for a, _ in factors.values())
    tensors: dict[str, Tensor] = {}
    for name, (a, b) in factors.items():
        _check(name, a, b, config)
        tensors[f"{PREFIX}{name}.lora_A.weight"] = nn.functional.pad(a, (0, 0, 0, rank - a.shape[0])).contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = nn.functional.pad(b, (0, rank - b.shape[1])).contiguous()
    plain = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(factors),
        task_type=config.task_type,
        inference_mode=True,
        fan_in_fan_out=config.fan_in_fan_out,
        base_model_name_or_path=config.base_model_name_or_path,
    )
    with files.publishing(target, MANIFEST) as staging:
        save_file(tensors, staging / ADAPTER_FILE, metadata={"format": "pt"})
        (staging / CARD).write_text(_card(config, rank, len(factors)), encoding="utf-8")
        plain.save_pretrained(str(staging))
    return target


def merge_dequantised(model: PeftModel, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Merge the active adapters into dense weights: every targeted k-bit layer becomes an `nn.Linear` of `dtype` that holds `W + dW`.

    The sum is taken in fp32 and rounded once. Layers without an adapter stay quantised. In bf16, rounding moves the update by up to 0.4 % of the *weight*; use
    float32 where the constraint must survive to the last digit.

    Returns:
        The base model, without adapters.

    Raises:
        ConfigError: adapters that trained other weights too (use `merge_and_unload` of a dense base for those), or one that is merged already.
    """
    if any(getattr(config, "modules_to_save", None) for config in config_table(model).values()):
        raise ConfigError("modules_to_save cannot be merged here. Load the base in 16 bit and use merge_and_unload().")
    base: nn.Module = model.get_base_model()
    layers = [(name, module) for name, module in base.named_modules() if isinstance(module, LoraLayer)]
    if any(layer.merged for _, layer in layers):
        raise ConfigError("an adapter is merged into the base weights. Call unmerge_adapter() first.")
    for name, layer in layers:
        inner = layer.get_base_layer()
        active = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
        delta = sum((layer.get_delta_weight(adapter).float() for adapter in active), start=torch.zeros(()))
        parent, _, child = name.rpartition(".")
        setattr(base.get_submodule(parent), child, _merged(inner, delta, dtype, name))
    if hasattr(base, "peft_config"):
        del base.peft_config
    _forget_quantisation(base)
    return base


def _merged(inner: nn.Module, delta: Tensor, dtype: torch.dtype, name: str) -> nn.Module:
    if weights.quantisation(inner) is None:
        weight: Tensor = inner.weight  # type: ignore[assignment]
        weight.data = (weight.data.float() + delta.to(weight.device)).to(weight.dtype)
        return inner
    dense = weights.dense_weight(inner, name)
    linear = nn.Linear(dense.shape[1], dense.shape[0], bias=inner.bias is not None, device="meta", dtype=dtype)
    linear.weight = nn.Parameter((dense + delta.to(dense.device)).to(dtype), requires_grad=False)
    if isinstance(inner.bias, Tensor):
        linear.bias = nn.Parameter(inner.bias.data.to(dtype), requires_grad=False)
    return linear


def _forget_quantisation(base: nn.Module) -> None:
    """Once no layer is quantised any more, the model is an ordinary one: it can be saved and moved."""
    if any(weights.quantisation(module) for module in base.modules()):
        return
    config: Any = getattr(base, "config", None)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    for flag in ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit", "quantization_method", "hf_quantizer"):
        if hasattr(base, flag):
            setattr(base, flag, None if flag in ("quantization_method", "hf_quantizer") else False)


def _check(name: str, a: Tensor, b: Tensor, config: ProtectedConfig) -> None:
    limit = leak_tolerance(b.dtype) * math.sqrt(a.shape[0])
    for side in config.sides:
        found = delta_leak(config.subspace.bases[name][side], a, b, side)
        if not found <= limit:
            raise ProtectionError(
                f"{name}: the exported update would reach {found:.2g} of its norm into the protected subspace (limit {limit:.2g}). Keep the adapter in fp32."
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

A plain LoRA adapter of rank {rank} over {modules} modules of `{base}`. It was trained under a safety constraint and exported by peft-safety; it computes the
same function as the protected adapter, and needs no other package than PEFT. The update has no component in the protected subspace. What that does to a
model's behaviour is not part of this guarantee: measure it.

| subspace | |
|---|---|
{rows}
"""
