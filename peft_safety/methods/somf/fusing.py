"""`fuse`: read the inputs, train or take a mask, apply it, write the result."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from peft_safety.core.plain_lora import MANIFEST
from peft_safety.core.publish import require_whole
from peft_safety.data.rows import Rows
from peft_safety.errors import ConfigError
from peft_safety.layers.adapters import config_table
from peft_safety.methods.somf.adapters import AdapterFusion
from peft_safety.methods.somf.checkpoints import CONFIG, CheckpointFusion
from peft_safety.methods.somf.masks import Masks, export, load_masks
from peft_safety.methods.somf.options import FuseOptions, MaskTraining
from peft_safety.methods.somf.report import FuseReport
from peft_safety.methods.somf.train import MaskRun, train_mask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Source = str | os.PathLike[str]
RECORDED = ("objective", "beta", "lr", "epochs", "max_steps", "batch_size", "gradient_accumulation", "seed")
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

    `theta = theta_safe + masked(sum_i w_i delta_i)` with a mask learned on safety data (SOMF), or without one (task
    arithmetic). TIES, DARE and other merges: PEFT's `model.add_weighted_adapter(..., combination_type=...)` for
    adapters, mergekit for full checkpoints.

    Args:
        safe: the aligned model: a name of an adapter on `model`, an adapter directory, or a full checkpoint; None
            where `model` is aligned itself.
        tasks: the fine-tuned ones, of the same kind.
        model: a PeftModel where names are given; the (loaded) base model to train a mask. It is not changed. For full
            checkpoints the safe model, instead of `safe`.
        tokenizer: for training; default the one stored with the model.
        mask: masks or logits, or a file of them, instead of training.
        data: rows to train on; see `train_mask`.
        training: how.
        out: directory for the result: a plain LoRA, or a full checkpoint. None writes nothing.
        adapter_name: add the result to the PeftModel under this name.
        **options: see `FuseOptions`.

    Returns:
        A report: per module what was kept, the masks, the factors.

    Raises:
        ConfigError: options, or inputs that do not belong together. ArtifactError, CheckpointError: inputs that are
            not whole. DataError: rows. Nothing is written then.

    Reference: Yi et al., SOMF, arXiv 2405.09055. Differences from its code: `docs/architecture.md`.
    """
    from accelerate import PartialState
    from peft import PeftModel

    chosen, training = FuseOptions(**options), training or MaskTraining()
    if mask is not None and chosen.method != "somf":
        raise ConfigError(f"mask= belongs to method='somf', not to {chosen.method!r}. Leave it out.")
    inputs = [os.path.realpath(source) for source in (safe, *tasks) if source is not None]
    if out is not None and (os.path.isfile(out) or os.path.realpath(out) in inputs):
        raise ConfigError(f"out={os.fspath(out)!r} is a file or an input. Give another directory.")
    if adapter_name is not None and (not isinstance(model, PeftModel) or adapter_name in config_table(model)):
        raise ConfigError(f"adapter_name={adapter_name!r} needs model=, a PeftModel without such an adapter.")
    fusion = _read(safe, tasks, model, chosen)
    given = load_masks(Path(mask)) if isinstance(mask, (str, os.PathLike)) else mask
    run: MaskRun | None = None
    facts: dict[str, Any] = {}
    if given is None and chosen.method == "somf":
        masked = fusion.masked(model)
        run = train_mask(masked, tokenizer, data, training)
        given = {name: logit.detach().cpu().clone() for name, logit in masked.logits.items()}
        facts = {**dataclasses.asdict(run), **{name: getattr(training, name) for name in RECORDED}}
    if given is None or isinstance(given, Masks):
        masks, logits = given, None
    else:
        logits = dict(given)
        masks = export(logits, chosen.export, density=chosen.export_density, seed=chosen.seed, record=facts)
    if masks is not None:
        masks.check(fusion.planned.mask_shapes)
    report = dataclasses.replace(fusion.planned, masks=masks, run=run, logits=logits)
    writes = out is not None and PartialState().is_main_process  # of several processes that train together, the first
    report = fusion.fused(report, Path(out) if out is not None and writes else None)
    if adapter_name is not None and isinstance(model, PeftModel) and isinstance(fusion, AdapterFusion):
        fusion.add(report, model, adapter_name)
    return report


def plan_fusion(
    safe: Source | None, tasks: Sequence[Source], *, model: nn.Module | None = None, **options: Any
) -> FuseReport:
    """Read and check the inputs of `fuse`, and say what it would do. Nothing is trained or written."""
    return _read(safe, tasks, model, FuseOptions(**options)).planned


def _read(
    safe: Source | None, tasks: Sequence[Source], model: nn.Module | None, options: FuseOptions
) -> AdapterFusion | CheckpointFusion:
    """Read and check everything that is fused."""
    if isinstance(tasks, (str, os.PathLike)) or not tasks:
        raise ConfigError(f"tasks={tasks!r}. Give a list of at least one adapter or checkpoint.")
    aligned, names = (None if safe is None else os.fspath(safe)), [os.fspath(task) for task in tasks]
    sources = [*([] if aligned is None else [aligned]), *names]
    places = [os.path.realpath(source) if os.path.isdir(source) else source for source in sources]
    if len(set(places)) < len(places):
        raise ConfigError(f"{sources}: an input is given more than once. Use weights to count it once more.")
    checkpoints = [source for source in sources if _is_checkpoint(source, model)]
    if checkpoints and len(checkpoints) < len(sources):
        raise ConfigError(f"{sources}: not all are full checkpoints. Give adapters only, or full checkpoints only.")
    kind = CheckpointFusion if checkpoints else AdapterFusion
    return kind(aligned, names, model, options)


def _is_checkpoint(source: str, model: nn.Module | None) -> bool:
    """Whether an input is a full checkpoint; otherwise it is an adapter.

    Raises:
        ConfigError: neither.
    """
    adapters = [] if model is None else sorted(config_table(model))
    if source in adapters:
        return False
    require_whole(Path(source), ours=False, warn=False)
    if Path(source, MANIFEST).is_file():
        return False
    if Path(source, CONFIG).is_file():
        return True
    raise ConfigError(
        f"{source!r} is neither an adapter of the model (it has {adapters}) nor a directory with {MANIFEST} or "
        f"{CONFIG}."
    )
