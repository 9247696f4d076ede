"""Safe LoRA on an adapter that is loaded."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from peft_safety import weights
from peft_safety.errors import ConfigError, UnsupportedLayerError
from peft_safety.estimate.checkpoints import ModuleWeights, open_weights
from peft_safety.layers.adapters import adapter_layers, config_table
from peft_safety.methods.base import INITS, ProtectedConfig
from peft_safety.methods.safe_lora.options import RepairOptions
from peft_safety.methods.safe_lora.repair import Factors, RepairReport, repair
from peft_safety.names import pin, places

UNFIT = {
    "use_dora": "DoRA rescales the update after lora_B",
    "lora_bias": "the bias of lora_B is not projected",
    "use_bdlora": "BD-LoRA has its own block-diagonal lora_B",
    "kasa_config": "KaSA has its own singular values between the factors",
    "target_parameters": "fused 3-D (MoE) parameters have no alignment direction of their own",
}
Model = str | os.PathLike[str] | nn.Module


def apply_safe_lora(
    peft_model: nn.Module,
    unaligned: Model,
    aligned: Model | None = None,
    *,
    adapter_name: str = "default",
    new_adapter_name: str | None = None,
    **options: Any,
) -> RepairReport:
    """Project a trained LoRA onto the alignment direction of its base model, module by module: `B <- C B`. Needs no
    data and no training.

    The two models are read as a stream, never loaded. Either every selected module is replaced or, on any error or
    interrupt, none.

    Args:
        peft_model: a PeftModel or a model with injected adapters; dense or bitsandbytes base.
        unaligned: the model before its alignment (the pretrained one): directory, Hub id, or module.
        aligned: the model after it, in 16 bit or more. Default: the weights under the adapter.
        new_adapter_name: leave `adapter_name` as it is and add the repaired adapter under this name.
        **options: see `RepairOptions`.

    Returns:
        A report: per module its cosine, whether it was repaired, what is left of the update.

    Raises:
        ConfigError: no such adapter, one that was repaired before, or whose update is not a plain `B A`.
        CheckpointError: see `repair`.
        UnsupportedLayerError: embeddings, convolutions, parameters.

    Reference: Hsu et al., Safe LoRA, NeurIPS 2024, arXiv 2405.16833.
    """
    chosen = RepairOptions(**options)
    table = config_table(peft_model)
    if adapter_name not in table:
        raise ConfigError(f"the model has no adapter {adapter_name!r}, only {sorted(table)}. Name one of these.")
    config = table[adapter_name]
    check_plain(config, f"adapter {adapter_name!r}")
    if new_adapter_name is not None and (new_adapter_name in table or not isinstance(peft_model, PeftModel)):
        raise ConfigError(
            f"new_adapter_name={new_adapter_name!r} needs a PeftModel without such an adapter. Choose another name."
        )
    layers = adapter_layers(peft_model, adapter_name)
    factors = {name: layer_factors(name, layer, adapter_name) for name, layer in layers.items()}
    check_different(unaligned, aligned)
    here = ModuleWeights(peft_model)
    new, report = repair(
        factors,
        open_weights(unaligned),
        here if aligned is None else open_weights(aligned),
        chosen,
        None if aligned is None else here,
    )
    if new_adapter_name is not None:
        _add(peft_model, adapter_name, new_adapter_name, layers, new)  # type: ignore[arg-type]
    else:
        _write(_weights(layers, "lora_B", adapter_name), new)
    table[new_adapter_name or adapter_name].safe_lora = report.record
    return report


def check_plain(config: Any, what: str) -> None:
    """Refuse an adapter whose update is not a plain, not yet repaired `s B A` on the base weights."""
    check_form(config, what)
    if (record := getattr(config, "safe_lora", None)) is not None:
        raise ConfigError(
            f"{what} has been repaired already ({record.get('projection')!r}), and the published projection is not "
            "idempotent. Start from the original adapter."
        )


def check_form(config: Any, what: str) -> None:
    """Refuse an adapter whose update is not a plain `s B A` on the base weights."""
    if isinstance(config, ProtectedConfig):
        raise ConfigError(
            f"{what} is protected ({type(config).__name__}); what is made of it would not keep its guarantee. Use "
            "peft_safety.export_lora first."
        )
    if not isinstance(config, LoraConfig):
        raise ConfigError(f"{what} is a {type(config).__name__}. Give a LoRA adapter.")
    for name, reason in UNFIT.items():
        if getattr(config, name, None):
            raise ConfigError(f"{what}: {name} is not supported: {reason}. Train without it.")
    if config.init_lora_weights not in (*INITS, "eva"):
        raise ConfigError(
            f"{what}: init_lora_weights={config.init_lora_weights!r} rewrote the base weight. Convert it to a plain "
            "LoRA on the original base first."
        )


def check_different(unaligned: Model, aligned: Model | None) -> None:
    """Refuse one path given twice before anything is read."""
    if unaligned is aligned:
        raise ConfigError(
            "unaligned and aligned are the same. Give the model before and the model after its alignment."
        )
    if isinstance(unaligned, nn.Module) or aligned is None or isinstance(aligned, nn.Module):
        return
    if os.path.realpath(unaligned) == os.path.realpath(aligned):
        raise ConfigError(
            f"unaligned and aligned are both {os.fspath(aligned)}. Give the model before and the model after its "
            "alignment."
        )


def layer_factors(name: str, layer: LoraLayer, adapter_name: str) -> Factors:
    """The factors of an adapter in one of its layers, not copied.

    Raises:
        ConfigError: merged, or not finite. UnsupportedLayerError: sharded, or on the meta device.
    """
    if layer.merged:
        raise ConfigError(f"{name}: an adapter is merged into the base weight. Call unmerge_adapter() first.")
    a, b = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
    if not weights.is_whole(a):
        raise UnsupportedLayerError(
            f"{name}: its factors are sharded or on the meta device. Use the saved directory instead."
        )
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise ConfigError(
            f"{name}: lora_A {tuple(a.shape)} or lora_B {tuple(b.shape)} holds NaN or Inf. Load the last good "
            "checkpoint."
        )
    return Factors(
        a.detach(), b.detach(), float(layer.scaling[adapter_name]), weights.is_conv1d(layer.get_base_layer())
    )


def _weights(layers: Mapping[str, LoraLayer], factor: str, adapter: str) -> dict[str, Tensor]:
    return {name: getattr(layer, factor)[adapter].weight for name, layer in layers.items()}


def _add(
    model: PeftModel, old: str, new: str, layers: Mapping[str, LoraLayer], repaired: Mapping[str, Tensor]
) -> None:
    """The repaired copy of an adapter under another name, whole or not at all; what trains, and what is active,
    stays.
    """
    config = copy.deepcopy(model.peft_config[old])
    pin(
        config,
        {name: (int(layer.r[old]), layer.lora_alpha[old]) for name, layer in layers.items()},
        places(model.get_base_model()),
    )
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.add_adapter(new, config)
        _write(_weights(layers, "lora_A", new), _weights(layers, "lora_A", old))
        _write(_weights(layers, "lora_B", new), {**_weights(layers, "lora_B", old), **repaired})
    except BaseException:
        if new in model.peft_config:
            model.delete_adapter(new)
        raise
    finally:
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)


@torch.no_grad()
def _write(targets: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """All or none, an interrupt included."""
    before = {name: targets[name].detach().clone() for name in values}
    try:
        for name, value in values.items():
            targets[name].copy_(value)
    except BaseException:
        for name, value in before.items():
            targets[name].copy_(value)
        raise
