"""Fusing a safe model with fine-tuned ones: `fuse`, and how adapters go through it."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peft_safety.data.rows import Rows
from peft_safety.errors import ConfigError
from peft_safety.layers.adapters import adapter_layers, config_table
from peft_safety.methods.somf import checkpoints
from peft_safety.methods.somf.compose import Independent, Update, recompressed
from peft_safety.methods.somf.forward import MaskedAdapters
from peft_safety.methods.somf.inputs import Adapters, Source, read_inputs
from peft_safety.methods.somf.masks import Masks, export
from peft_safety.methods.somf.options import FuseOptions, MaskTraining
from peft_safety.methods.somf.plan import NONLINEAR, FusePlan, granularity_of, plan_of, updates_of
from peft_safety.methods.somf.publish import card_of, lora_config, main_process, write_adapter
from peft_safety.methods.somf.report import FuseReport, ModuleFusion, overall, product_norm, share
from peft_safety.methods.somf.storage import load_masks
from peft_safety.methods.somf.train import MaskRun, trained_logits
from peft_safety.names import places
from peft_safety.projection import top_singular

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

RECORD_VERSION = 1
Mask = Masks | Mapping[str, Tensor] | str | os.PathLike[str]


def fuse(
    safe: Source | None,
    tasks: Sequence[Source],
    *,
    model: nn.Module | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    mask: Mask | None = None,
    data: Rows | None = None,
    training: MaskTraining | None = None,
    out: str | os.PathLike[str] | None = None,
    adapter_name: str | None = None,
    **options: Any,
) -> FuseReport:
    """One model out of a safe one and fine-tuned ones: it keeps what they learned as far as a mask lets it, and the
    safety.

    `theta = theta_safe + F(m * delta_1, ..., m * delta_T)` with a mask m learned on safety data (SOMF), or any of the
    usual fusions F without one.

    Args:
        safe: the aligned model: a name of an adapter on `model`, an adapter directory, or a full checkpoint; None
            where the base model is aligned itself.
        tasks: the fine-tuned ones, of the same kind.
        model: a PeftModel where names are given; the (loaded) base model to train a mask, for checkpoints the safe
            one. It is not changed.
        tokenizer: for training; default the one stored with `model`.
        mask: masks or logits, or a file of them, instead of training.
        data: rows to train on; see `train_mask`.
        training: how.
        out: directory for the result: a plain LoRA, or full weights. None writes nothing.
        adapter_name: add the result to the PeftModel under this name.
        **options: see `FuseOptions`.

    Returns:
        A report: per module what was kept, the masks, the factors.

    Raises:
        ConfigError: options, or inputs that do not belong together. ArtifactError, CheckpointError: inputs that are
            not whole. DataError: rows. Nothing is written then.

    Reference: Yi et al., SOMF, arXiv 2405.09055. Differences from its code: `docs/architecture.md`; switches to what
        was published: `FuseOptions`.
    """
    chosen = FuseOptions(**options)
    inputs = read_inputs(safe, tasks, model, chosen)
    plan = plan_of(inputs, chosen, safe, tasks)
    _check_call(safe, tasks, model, mask, out, adapter_name, chosen)
    settings = MaskTraining() if training is None else training
    if not isinstance(inputs, Adapters):
        return checkpoints.fuse_checkpoints(
            inputs,
            plan,
            chosen,
            _masks(mask, chosen),
            model,
            tokenizer,
            data,
            settings,
            None if out is None else Path(out),
        )
    updates = updates_of(inputs, granularity_of(inputs, chosen), chosen)
    masks, logits = _masks(mask, chosen)
    run: MaskRun | None = None
    if masks is None and chosen.method == "somf":
        logits, run = trained_logits(MaskedAdapters(_needed(model), updates, chosen), tokenizer, data, settings)
        masks = export(
            logits,
            chosen.export,
            density=chosen.export_density,
            seed=chosen.seed,
            record=_training_facts(settings, run),
        )
    report = dataclasses.replace(_fused(inputs, plan, updates, masks, chosen), run=run, logits=logits)
    if out is not None and main_process():
        card = card_of(report.record, [dataclasses.asdict(module) for module in report.modules], "LoRA")
        base = next((a.base for a in (inputs.first, *inputs.tasks) if a.base), None) or _base_name(model)
        write_adapter(Path(out), report.factors, base, inputs.first.fields, masks, report.record, card)
    if adapter_name is not None and model is not None:
        _add(model, adapter_name, report.factors, inputs.first.fields)  # type: ignore[arg-type]
    return report


def _needed(model: nn.Module | None) -> nn.Module:
    if model is None:
        raise ConfigError(
            "method='somf' trains a mask, which needs model= (and its tokenizer). Give them, a mask= that is trained, "
            "or another method."
        )
    return model


def _masks(mask: Mask | None, options: FuseOptions) -> tuple[Masks | None, dict[str, Tensor] | None]:
    """Masks that were given, exported if they are logits."""
    found = load_masks(Path(mask)) if isinstance(mask, (str, os.PathLike)) else mask
    if found is None or isinstance(found, Masks):
        return found, None
    return export(found, options.export, density=options.export_density, seed=options.seed), dict(found)


def _training_facts(training: MaskTraining, run: MaskRun) -> dict[str, Any]:
    names = (
        "objective",
        "beta",
        "reference",
        "lr",
        "epochs",
        "max_steps",
        "batch_size",
        "gradient_accumulation",
        "seed",
    )
    return {
        **{name: getattr(training, name) for name in names},
        "steps": run.steps,
        "rows": run.rows,
        "loss": run.loss,
    }


def _check_call(
    safe: Source | None,
    tasks: Sequence[Source],
    model: nn.Module | None,
    mask: Mask | None,
    out: str | os.PathLike[str] | None,
    adapter_name: str | None,
    options: FuseOptions,
) -> None:
    """Everything about a call that can be refused before work begins."""
    from peft import PeftModel

    if mask is not None and options.method != "somf":
        raise ConfigError(
            f"mask= belongs to method='somf', not to {options.method!r}. Leave it out, or use method='somf' with "
            f"fusion={options.method!r}."
        )
    if mask is None and options.method == "somf":
        _needed(model)
    if out is not None:
        if os.path.isfile(out):
            raise ConfigError(f"out={os.fspath(out)!r} is a file. Give a directory.")
        taken = next(
            (
                source
                for source in (safe, *tasks)
                if source is not None and os.path.realpath(source) == os.path.realpath(out)
            ),
            None,
        )
        if taken is not None:
            raise ConfigError(
                f"{os.fspath(taken)} is also the output directory. Write somewhere else; the inputs stay."
            )
    if adapter_name is not None and (not isinstance(model, PeftModel) or adapter_name in config_table(model)):
        raise ConfigError(
            f"adapter_name={adapter_name!r} needs model= to be a PeftModel without such an adapter. Choose another "
            "name."
        )


@torch.no_grad()
def _fused(
    inputs: Adapters, plan: FusePlan, updates: Mapping[str, Update], masks: Masks | None, options: FuseOptions
) -> FuseReport:
    """The factors of every module, and the report."""
    covers = {key: count for update in updates.values() for key, count in update.covers.items()}
    if masks is not None:
        _check_masks(masks, updates)
    dense = not inputs.continued and plan.fusion in NONLINEAR
    rows, factors = [], {}
    for planned in plan.modules:
        name, update = planned.name, updates[planned.name]
        if dense and isinstance(update, Independent):
            a, b, error = _truncated(update.dense(), planned.rank)
        else:
            a, b = update.factors(masks)
            a, b, error = recompressed(a, b, planned.rank) if planned.rank < a.shape[0] else (a, b, 0.0)
        own = (
            None
            if masks is None
            else Masks({key: masks.values[key] for key in update.shapes}, masks.levels).density(update.covers)
        )
        kept = None if masks is None else _kept(update, masks)
        dtype = _dtype(inputs, name)
        factors[name] = (a.to("cpu", dtype), b.to("cpu", dtype))
        rows.append(ModuleFusion(name, a.shape[0], own, kept, error))
    modules = tuple(rows)
    record = {
        "version": RECORD_VERSION,
        **options.facts(len(inputs.tasks)),
        "layout": plan.layout,
        **({"granularity": plan.granularity} if plan.granularity else {}),
        "safe": {"name": "the base model", "fingerprint": ""} if inputs.safe is None else inputs.safe.provenance(),
        "tasks": [task.provenance() for task in inputs.tasks],
        **overall(modules, masks, covers),
        **({"mask": {**masks.record, "digest": mask_digest(masks)}} if masks is not None else {}),
    }
    return FuseReport(plan, modules, record, masks=masks, factors=factors)


def mask_digest(masks: Masks) -> str:
    """sha256 over all masks by name."""
    digest = hashlib.sha256(str(masks.levels).encode())
    for name in sorted(masks.values):
        digest.update(name.encode() + masks.values[name].numpy().tobytes())
    return digest.hexdigest()


def _check_masks(masks: Masks, updates: Mapping[str, Update]) -> None:
    shapes = {key: shape for update in updates.values() for key, shape in update.shapes.items()}
    found = {key: tuple(value.shape) for key, value in masks.values.items()}
    if found != shapes:
        odd = next(key for key in sorted(found.keys() | shapes.keys()) if found.get(key) != shapes.get(key))
        raise ConfigError(
            f"{odd}: the masks have {found.get(odd, 'no such entry')}, this fusion {shapes.get(odd, 'none')}. Use the "
            "granularity and inputs of the masks."
        )


def _kept(update: Update, masks: Masks) -> float | None:
    """Length of the tasks' part, relative to the same without a mask."""
    safe = (*update.aligned(), -1.0)
    with_mask, without = (product_norm([(*update.factors(m), 1.0), safe]) for m in (masks, None))
    return share(with_mask, without)


def _truncated(dense: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The leading singular part of a dense update, as factors, and its relative error."""
    u, s, v = top_singular(dense, rank)
    a, b = s.sqrt()[:, None] * v.mT, u * s.sqrt()
    total = float(dense.norm())
    return a, b, float((dense - b @ a).norm()) / total if total > 0 else 0.0


def _dtype(inputs: Adapters, name: str) -> torch.dtype:
    """The widest of the inputs' factors."""
    found = [adapter.factors[name].b.dtype for adapter in ([inputs.safe] if inputs.safe else []) + list(inputs.tasks)]
    widest = found[0]
    for dtype in found[1:]:
        widest = torch.promote_types(widest, dtype)
    return widest


def _base_name(model: nn.Module | None) -> str | None:
    return getattr(getattr(model, "config", None), "_name_or_path", None) or None


def _add(model: PeftModel, name: str, factors: Mapping[str, tuple[Tensor, Tensor]], fields: Mapping[str, Any]) -> None:
    """The result as one more adapter; what is active, and what trains, stays. Whole or not at all."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    config = lora_config(factors, _base_name(model), fields, places(model.get_base_model()))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # PEFT notes that there is an adapter already
            model.add_adapter(name, config)
        with torch.no_grad():
            for module, layer in adapter_layers(model, name).items():
                layer.lora_A[name].weight.copy_(factors[module][0])
                layer.lora_B[name].weight.copy_(factors[module][1])
    except BaseException:
        if name in model.peft_config:
            model.delete_adapter(name)
        raise
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
