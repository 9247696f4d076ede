"""Safe LoRA on an adapter that is loaded."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from peft_safety.core.checkpoints import ModuleWeights, open_weights
from peft_safety.core.names import pin, places
from peft_safety.core.plain_lora import check_plain
from peft_safety.errors import ConfigError
from peft_safety.layers.adapters import adapter_layers, config_table
from peft_safety.methods.factors import layer_factors
from peft_safety.methods.safe_lora.options import RepairOptions
from peft_safety.methods.safe_lora.repair import RepairReport, repair

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
    check_unrepaired(config, f"adapter {adapter_name!r}")
    if new_adapter_name is not None and (new_adapter_name in table or not isinstance(peft_model, PeftModel)):
        raise ConfigError(
            f"new_adapter_name={new_adapter_name!r} needs a PeftModel without such an adapter. Choose another name."
        )
    layers = adapter_layers(peft_model, adapter_name)
    factors = {name: layer_factors(name, layer, adapter_name) for name, layer in layers.items()}
    check_different(unaligned, aligned)
    own = ModuleWeights(peft_model)
    new, report = repair(
        factors,
        open_weights(unaligned),
        own if aligned is None else open_weights(aligned),
        chosen,
        None if aligned is None else own,
    )
    if new_adapter_name is not None:
        _add(peft_model, adapter_name, new_adapter_name, layers, new)  # type: ignore[arg-type]
    else:
        _write(_weights(layers, "lora_B", adapter_name), new)
    table[new_adapter_name or adapter_name].safe_lora = report.record
    return report


def check_unrepaired(config: Any, what: str) -> None:
    """Refuse an adapter that Safe LoRA has repaired already."""
    record = getattr(config, "safe_lora", None)
    if record is not None:
        raise ConfigError(
            f"{what} has been repaired already ({record.get('projection')!r}), and the published projection is not "
            "idempotent. Start from the original adapter."
        )


def check_different(unaligned: Model, aligned: Model | None) -> None:
    """Refuse one model or path given twice before anything is read."""
    one, other = (m if isinstance(m, (nn.Module, type(None))) else os.path.realpath(m) for m in (unaligned, aligned))
    if one == other:
        label = type(one).__name__ if isinstance(one, nn.Module) else one
        raise ConfigError(
            f"unaligned and aligned are both {label}. Give the model before and the model after its alignment."
        )


def _weights(layers: Mapping[str, LoraLayer], factor: str, adapter: str) -> dict[str, Tensor]:
    return {name: getattr(layer, factor)[adapter].weight for name, layer in layers.items()}


def _add(
    model: PeftModel, old: str, new: str, layers: Mapping[str, LoraLayer], repaired: Mapping[str, Tensor]
) -> None:
    """The repaired copy of an adapter under another name."""
    config = copy.deepcopy(model.peft_config[old])
    modules = {name: (int(layer.r[old]), layer.lora_alpha[old]) for name, layer in layers.items()}
    pin(config, modules, places(model.get_base_model()))
    with new_adapter(model, new, config):
        _write(_weights(layers, "lora_A", new), _weights(layers, "lora_A", old))
        _write(_weights(layers, "lora_B", new), {**_weights(layers, "lora_B", old), **repaired})


@contextmanager
def new_adapter(model: PeftModel, name: str, config: LoraConfig) -> Iterator[dict[str, LoraLayer]]:
    """Add an adapter, and fill it in the block: whole or not at all. What trains, and what is active, stays.

    Yields:
        Its layers, by module.
    """
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # PEFT notes that there is an adapter already
            model.add_adapter(name, config)
        with torch.no_grad():
            yield adapter_layers(model, name)
    except BaseException:
        if name in model.peft_config:
            model.delete_adapter(name)
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
