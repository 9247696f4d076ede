"""`fuse`: read the inputs, train or take a mask, apply it, write the result and a report of it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from peft_safety.core import publish
from peft_safety.core.names import public_name
from peft_safety.core.plain_lora import CARD, MANIFEST
from peft_safety.data.rows import Rows
from peft_safety.errors import ConfigError
from peft_safety.layers.adapters import config_table
from peft_safety.methods.somf.adapters import AdapterFusion
from peft_safety.methods.somf.checkpoints import CONFIG, CheckpointFusion
from peft_safety.methods.somf.masks import Masks, Shape, export, load_masks, save_masks
from peft_safety.methods.somf.options import FuseOptions, MaskTraining
from peft_safety.methods.somf.train import MaskRun, train_mask

Source = str | os.PathLike[str]
RECORDED = ("objective", "beta", "lr", "epochs", "max_steps", "batch_size", "gradient_accumulation", "seed")
RECORD = "peft_safety_fusion.json"
"""File with the report, in the directory of a result."""
CARD_TEXT = f"""---
{{tags}}
---
# Fused by peft-safety

A safe model and fine-tuned ones in one (SOMF, arXiv 2405.09055). Nothing here promises how it behaves: measure
refusal, over-refusal and the tasks. `{RECORD}` has a row for every mask.

| | |
|---|---|
{{rows}}
"""


@dataclass(frozen=True)
class FuseReport:
    """What decided a fusion (`facts`: layout, granularity, options, inputs, number of modules, rank of the result, 0
    for full weights), and what came of it.

    Attributes:
        mask_shapes, masks: by the masks' full names; what was applied.
        run, logits: what training the mask cost; its logits, from which any density can be exported again.
        factors: `{module: (A, B)}` of a LoRA result, the scaling included in B.
    """

    facts: dict[str, Any]
    mask_shapes: dict[str, Shape]
    masks: Masks | None = None
    run: MaskRun | None = None
    logits: dict[str, Tensor] | None = None
    factors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def mask_entries(self) -> int:
        return sum(map(math.prod, self.mask_shapes.values()))

    @property
    def record(self) -> dict[str, Any]:
        """Facts and figures, as plain values; of memory the least that training adds to model and frozen factors."""
        logits_and_moments = 3 * 4 * self.mask_entries  # AdamW's two, in fp32
        record = {**self.facts, "mask_entries": self.mask_entries, "training_bytes": logits_and_moments}
        if self.masks is not None:
            record |= {"density": self.masks.density(), "mask": self.masks.record}
        return record

    def to_json(self) -> dict[str, Any]:
        """The record, and shape and density (the share of kept entries) of every mask."""
        values = {} if self.masks is None else self.masks.values
        rows = {
            name: {"shape": list(shape), "density": float(values[name].float().mean()) if values else None}
            for name, shape in self.mask_shapes.items()
        }
        return {**self.record, "masks": rows}

    def write(self, folder: Path) -> None:
        if self.masks is not None:
            save_masks(self.masks, folder)
        (folder / RECORD).write_text(json.dumps(self.to_json(), indent=2, sort_keys=True), encoding="utf-8")
        rows = "\n".join(f"| {key.replace('_', ' ')} | {value} |" for key, value in self.record.items())
        tags = ("library_name: peft\n" if self.factors else "") + "tags: [safety, peft-safety]"
        (folder / CARD).write_text(CARD_TEXT.format(tags=tags, rows=rows), encoding="utf-8")


def fuse(
    safe: Source | None,
    tasks: Sequence[Source],
    *,
    model: nn.Module | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    mask: Masks | Mapping[str, Tensor] | Source | None = None,
    data: Rows | None = None,
    training: MaskTraining | None = None,
    out: Source | None = None,
    adapter_name: str | None = None,
    **options: Any,
) -> FuseReport:
    """One model out of a safe one and fine-tuned ones: `theta = theta_safe + masked(sum_i w_i delta_i)` with a mask
    learned on safety data (SOMF), or without one (task arithmetic). Other merges are those of PEFT's
    `model.add_weighted_adapter` and of mergekit.

    Args:
        safe: the aligned model: a name of an adapter on `model`, an adapter directory, or a full checkpoint; None
            where `model` is aligned itself.
        tasks: the fine-tuned ones, of the same kind.
        model: a PeftModel where names are given; the base model to train a mask. For full checkpoints the safe model,
            instead of `safe`. It is not changed.
        mask: masks or logits, or a file of them, instead of training.
        tokenizer, data, training: of the mask; see `train_mask`.
        out: directory for the result: a plain LoRA, or a full checkpoint.
        adapter_name: add the result to the PeftModel under this name.
        **options: see `FuseOptions`.

    Returns:
        A `FuseReport`: what the mask keeps of each module, and where the result is.

    Raises:
        ConfigError, ArtifactError, CheckpointError, DataError: of options, inputs and rows. Nothing is written then.

    Reference: Yi et al., SOMF, arXiv 2405.09055. Differences from its code: `docs/methods/somf.md`.
    """
    chosen, training = FuseOptions(**options), training or MaskTraining()
    if mask is not None and chosen.method != "somf":
        raise ConfigError(f"mask= belongs to method='somf', not to {chosen.method!r}. Leave it out.")
    inputs = [os.path.realpath(source) for source in (safe, *tasks) if source is not None]
    if out is not None and (os.path.isfile(out) or os.path.realpath(out) in inputs):
        raise ConfigError(f"out={os.fspath(out)!r} is a file or an input. Give another directory.")
    fusion = _read(safe, tasks, model, chosen)
    if adapter_name is not None and (
        not (isinstance(model, PeftModel) and isinstance(fusion, AdapterFusion)) or adapter_name in config_table(model)
    ):
        raise ConfigError(f"adapter_name={adapter_name!r} needs adapters, and a PeftModel model= without such a name.")
    report, record = _planned(fusion), {}
    masks = load_masks(Path(mask)) if isinstance(mask, (str, os.PathLike)) else mask
    if masks is None and chosen.method == "somf":
        masked = fusion.masked(model)
        run = train_mask(masked, tokenizer, data, training)
        report = replace(report, run=run)
        masks = {name: logit.detach().cpu().clone() for name, logit in masked.logits.items()}
        record = {**asdict(run), **{name: getattr(training, name) for name in RECORDED}}
    if masks is not None and not isinstance(masks, Masks):
        report = replace(report, logits=dict(masks))
        masks = export(masks, chosen.export, density=chosen.export_density, seed=chosen.seed, record=record)
    if masks is not None:
        masks.check(report.mask_shapes)
    mask_of = None if masks is None else masks.of
    with torch.no_grad():
        factors = fusion.fused(mask_of) if isinstance(fusion, AdapterFusion) else {}
        report = replace(report, masks=masks, factors=factors)
        if out is not None and PartialState().is_main_process:  # of several processes that train together, the first
            fusion.write(Path(out), mask_of, report.write)
    if adapter_name is not None and isinstance(fusion, AdapterFusion):
        fusion.add(factors, model, adapter_name)
    return report


def plan_fusion(
    safe: Source | None, tasks: Sequence[Source], *, model: nn.Module | None = None, **options: Any
) -> FuseReport:
    """Read and check the inputs of `fuse`, and say what it would do. Nothing is trained or written."""
    return _planned(_read(safe, tasks, model, FuseOptions(**options)))


def _planned(fusion: AdapterFusion | CheckpointFusion) -> FuseReport:
    """The report of inputs that were read and checked, if no two of them hold the same weights."""
    labels: dict[str, str] = {}
    for label, digest in fusion.fingerprints.items():
        if (twin := labels.setdefault(digest, label)) != label:
            remedy = "Give every input once, and tasks after their fine-tuning; weights counts one more"
            raise ConfigError(f"{label} holds the same weights as {twin}. {remedy}.")
    options, tasks = fusion.options, len(fusion.weights)
    inputs = [{"name": public_name(label), "fingerprint": digest} for label, digest in fusion.fingerprints.items()]
    safe = inputs[0] if len(inputs) > tasks else {"name": "the base model", "fingerprint": ""}
    facts = {"version": 1, "method": options.method, "weights": fusion.weights, **fusion.facts}
    facts |= {"safe": safe, "tasks": inputs[-tasks:]}
    if options.method != "somf":
        return FuseReport(facts, {})
    names = ("rescale", "temperature", "export", "export_density", "seed")
    masked = {name: value for name in names if (value := getattr(options, name)) is not None}
    return FuseReport({**facts, "granularity": fusion.granularity, **masked}, fusion.mask_shapes)


def _read(
    safe: Source | None, tasks: Sequence[Source], model: nn.Module | None, options: FuseOptions
) -> AdapterFusion | CheckpointFusion:
    if isinstance(tasks, (str, os.PathLike)) or not tasks:
        raise ConfigError(f"tasks={tasks!r}. Give a list of at least one adapter or checkpoint.")
    aligned, names = (None if safe is None else os.fspath(safe)), [os.fspath(task) for task in tasks]
    sources = [*([] if aligned is None else [aligned]), *names]
    if len({os.path.realpath(source) if os.path.isdir(source) else source for source in sources}) < len(sources):
        raise ConfigError(f"{sources}: an input is given more than once. Use weights to count it once more.")
    checkpoints = [_is_checkpoint(source, model) for source in sources]
    if any(checkpoints) and not all(checkpoints):
        raise ConfigError(f"{sources}: not all are full checkpoints. Give adapters only, or full checkpoints only.")
    return (CheckpointFusion if all(checkpoints) else AdapterFusion)(aligned, names, model, options)


def _is_checkpoint(source: str, model: nn.Module | None) -> bool:
    """Whether an input is a full checkpoint; otherwise it is an adapter."""
    adapters = [] if model is None else sorted(config_table(model))
    if source in adapters:
        return False
    publish.require_whole(Path(source), ours=False, warn=False)
    is_adapter, is_model = (Path(source, name).is_file() for name in (MANIFEST, CONFIG))
    if not (is_adapter or is_model):
        expected = f"an adapter of the model (it has {adapters}) nor a directory with {MANIFEST} or {CONFIG}"
        raise ConfigError(f"{source!r} is neither {expected}. Check the spelling.")
    return not is_adapter
