"""Safe LoRA on an adapter that is loaded, and on a saved one."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

from peft_safety.core import features, plain_lora
from peft_safety.core.checkpoints import FileWeights, ModuleWeights, open_weights
from peft_safety.core.names import listed, pin, places
from peft_safety.core.snapshot import reading
from peft_safety.errors import ConfigError
from peft_safety.layers.adapters import adapter_layers, config_table
from peft_safety.methods.factors import beside_factors, layer_factors
from peft_safety.methods.safe_lora.config import RepairOptions
from peft_safety.methods.safe_lora.repair import UNCONSTRAINED, RepairReport, repair

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
    data and no training; the two models are read as a stream. Every selected module is replaced or, on any error,
    none.

    Args:
        peft_model: a PeftModel or a model with injected adapters; dense or bitsandbytes base.
        unaligned: the model before its alignment (the pretrained one): directory, Hub id, or module.
        aligned: the model after it, in 16 bit or more. Default: the weights under the adapter.
        adapter_name: the LoRA to repair.
        new_adapter_name: leave `adapter_name` as it is and add the repaired adapter under this name.
        **options: see `RepairOptions`.

    Returns:
        A `RepairReport`: cosine, choice and what was removed of each module.

    Raises:
        ConfigError: no such adapter, one that was repaired before, or whose update is not a plain `B A`.
        CheckpointError: see `repair`. UnsupportedLayerError: embeddings, convolutions, parameters.

    Reference: Hsu et al., Safe LoRA, NeurIPS 2024, arXiv 2405.16833.
    """
    chosen, table = RepairOptions(**options), config_table(peft_model)
    if adapter_name not in table:
        raise ConfigError(f"the model has no adapter {adapter_name!r}, only {sorted(table)}. Name one of these.")
    config = table[adapter_name]
    features.check_plain(config, f"adapter {adapter_name!r}")
    _check_unrepaired(config, f"adapter {adapter_name!r}")
    if new_adapter_name is not None and (new_adapter_name in table or not isinstance(peft_model, PeftModel)):
        needs = "needs a PeftModel without such an adapter"
        raise ConfigError(f"new_adapter_name={new_adapter_name!r} {needs}. Choose another name.")
    layers = adapter_layers(peft_model, adapter_name, linear=True)
    factors = {name: layer_factors(name, layer, adapter_name) for name, layer in layers.items()}
    _check_different(unaligned, aligned)
    own, before = ModuleWeights(peft_model), open_weights(unaligned)
    if aligned is None:
        new, report = repair(factors, before, own, chosen)
    else:
        new, report = repair(factors, before, open_weights(aligned), chosen, own)
    _name_others(report, beside_factors(peft_model, adapter_name))
    if new_adapter_name is None:
        _write([(layers[name].lora_B[adapter_name].weight, b) for name, b in new.items()])
    else:
        config = copy.deepcopy(config)
        sizes = {name: (int(layer.r[adapter_name]), layer.lora_alpha[adapter_name]) for name, layer in layers.items()}
        pin(config, sizes, places(peft_model.get_base_model()))  # type: ignore[arg-type, operator]
        add_adapter(peft_model, new_adapter_name, config, {n: (f.a, new.get(n, f.b)) for n, f in factors.items()})
    table[new_adapter_name or adapter_name].safe_lora = report.record
    return report


def safe_lora_dir(
    adapter_dir: str | os.PathLike[str],
    unaligned: Model,
    aligned: Model | None = None,
    out_dir: str | os.PathLike[str] | None = None,
    **options: Any,
) -> RepairReport:
    """`apply_safe_lora` for a saved LoRA adapter, without building its model. The result is a plain LoRA directory,
    written atomically; without `out_dir` there is only the report. The source is not touched.

    Args:
        adapter_dir: directory of the plain LoRA.
        unaligned: the model before its alignment: directory, Hub id, or module.
        aligned: default, the adapter's `base_model_name_or_path`.
        out_dir: new directory for the repaired adapter.
        **options: see `RepairOptions`.

    Returns:
        A `RepairReport`, as of `apply_safe_lora`.

    Raises:
        ArtifactError: the directory is not a whole, finite LoRA adapter, or `out_dir` cannot be written.
        ConfigError, CheckpointError: see `apply_safe_lora`.
    """
    chosen, source = RepairOptions(**options), Path(adapter_dir)
    plain_lora.check_elsewhere(source, out_dir)
    with reading(source, warn=True) as path:
        plain = plain_lora.read_plain(path)
    _check_unrepaired(plain.config, str(source))
    name: str | None = plain.fields.get("base_model_name_or_path") or None
    after: Model | None = name if aligned is None else aligned
    if after is None:
        raise ConfigError(f"{source}: the adapter does not say which base model it is for. Give aligned=.")
    _check_different(unaligned, after)
    base = FileWeights(name) if aligned is not None and name is not None and os.path.isdir(name) else None
    new, report = repair(plain.factors, open_weights(unaligned), open_weights(after), chosen, base)
    _name_others(report, [key.removeprefix(plain_lora.PREFIX) for key in sorted(plain.extra)])
    if out_dir is not None:
        fields = dict(plain.fields)
        if fields["peft_type"] == plain_lora.REPAIRED_TYPE:
            fields["safe_lora"] = report.record
        pairs = {module: (f.a, new.get(module, f.b)) for module, f in plain.factors.items()}
        tensors = plain.extra | plain_lora.factor_tensors(pairs)
        card = plain_lora.card_with(source, _card(report.record))
        plain_lora.write_plain(Path(out_dir), tensors, fields, card, {plain_lora.RECORD: report.record})
    return report


def _name_others(report: RepairReport, names: Sequence[str]) -> None:
    """Name, in the record, what the adapter trains beside its factors, which no projection reaches."""
    if names:
        report.record[UNCONSTRAINED] = list(names)


def _card(record: dict[str, Any]) -> str:
    others = record.get(UNCONSTRAINED, ())
    also = f"\nIt also holds trained tensors that no projection reaches: {listed(others)}.\n" if others else ""
    return f"""## Safe LoRA

Repaired after training by peft-safety (Safe LoRA, arXiv 2405.16833): {record["repaired"]} of
{record["modules"]} modules were projected (`{record["projection"]}`, selection `{record["select"]}`) onto the
difference between `{record["aligned"]["name"]}` and
`{record["unaligned"]["name"]}`. Do not apply it again. What this does to a
model's behavior has to be measured.
{also}"""


def _check_unrepaired(config: Any, what: str) -> None:
    if (record := getattr(config, "safe_lora", None)) is not None:
        done = f"has been repaired already ({record.get('projection')!r})"
        raise ConfigError(f"{what} {done}; a second repair would change it again. Start from the original adapter.")


def _check_different(unaligned: Model, aligned: Model | None) -> None:
    """Refuse one model or path given twice before anything is read."""
    one, other = (m if isinstance(m, (nn.Module, type(None))) else os.path.realpath(m) for m in (unaligned, aligned))
    if one == other:
        label = type(one).__name__ if isinstance(one, nn.Module) else one
        raise ConfigError(f"unaligned and aligned are both {label}. Give the models before and after the alignment.")


def add_adapter(model: Any, name: str, config: LoraConfig, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Add an adapter with the factors `(A, B)` by module: whole or not at all. What trains and is active stays so."""
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # PEFT notes that there is an adapter already
            model.add_adapter(name, config)
        layers = adapter_layers(model, name, linear=True)
        _write([(layers[module].lora_A[name].weight, a) for module, (a, _) in pairs.items()])
        _write([(layers[module].lora_B[name].weight, b) for module, (_, b) in pairs.items()])
    except BaseException:
        if name in model.peft_config:
            model.delete_adapter(name)
        raise
    finally:
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)


@torch.no_grad()
def _write(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Copy each second tensor into the first of its pair: all or none, an interrupt included."""
    before = [target.detach().clone() for target, _ in pairs]
    try:
        for target, value in pairs:
            target.copy_(value)
    except BaseException:
        for (target, _), value in zip(pairs, before, strict=True):
            target.copy_(value)
        raise
