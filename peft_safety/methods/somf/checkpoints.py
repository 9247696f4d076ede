"""Full checkpoints: fused tensor by tensor, straight from file to file; the result is a checkpoint again, or a LoRA on
the safe one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from peft_safety import files, weights
from peft_safety.artifact import CARD
from peft_safety.data.rows import Rows
from peft_safety.errors import CheckpointError, ConfigError
from peft_safety.estimate.checkpoints import INDEX
from peft_safety.methods.somf.compose import dense_tensor
from peft_safety.methods.somf.forward import MaskedWeights
from peft_safety.methods.somf.inputs import Checkpoints
from peft_safety.methods.somf.masks import Masks, export
from peft_safety.methods.somf.options import FuseOptions, MaskTraining
from peft_safety.methods.somf.plan import FusePlan
from peft_safety.methods.somf.publish import (
    Shards,
    card_of,
    copy_beside,
    element_size,
    main_process,
    target,
    write_adapter,
)
from peft_safety.methods.somf.report import FuseReport, ModuleFusion, overall, share
from peft_safety.methods.somf.storage import save_masks
from peft_safety.methods.somf.train import MaskRun, trained_logits
from peft_safety.naming import public_name
from peft_safety.projection import top_singular

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRANSPOSED = ("gpt2", "openai-gpt", "decision_transformer")
"""Model types whose linear weights are stored `(in, out)`."""


def fuse_checkpoints(
    inputs: Checkpoints,
    plan: FusePlan,
    options: FuseOptions,
    given: tuple[Masks | None, dict[str, Tensor] | None],
    model: nn.Module | None,
    tokenizer: PreTrainedTokenizerBase | None,
    data: Rows | None,
    training: MaskTraining,
    out: Path | None,
) -> FuseReport:
    """`fuse` for full checkpoints; see there.

    Raises:
        ConfigError: a task that equals the safe checkpoint or another task; a model whose parameters are others.
        CheckpointError: a weight that is not finite, or not covered by the masks.
    """
    masks, logits = given
    run: MaskRun | None = None
    if options.method == "somf" and masks is None and model is not None:
        logits, run = _trained(inputs, plan, options, model, tokenizer, data, training)
        masks = export(
            logits,
            options.export,
            density=options.export_density,
            seed=options.seed,
            record={"objective": training.objective, "steps": run.steps},
        )
    job = _Job(inputs, plan, options, masks)
    out = out if main_process() else None
    report = job.low_rank(out) if options.rank is not None else job.full(out)
    return dataclasses.replace(report, run=run, logits=logits)


def _trained(
    inputs: Checkpoints,
    plan: FusePlan,
    options: FuseOptions,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    data: Rows | None,
    training: MaskTraining,
) -> tuple[dict[str, Tensor], MaskRun]:
    parameters = dict(model.named_parameters())
    vectors = {}
    for key, shape in inputs.fused.items():
        if key not in parameters or tuple(parameters[key].shape) != shape:
            found = tuple(parameters[key].shape) if key in parameters else "no such parameter"
            raise ConfigError(
                f"{key}: the checkpoints hold {shape}, the model {found}. Load the safe checkpoint itself as model=."
            )
        safe, found_vectors = inputs.vectors(key)
        if weights.distance(_sample(parameters[key].detach().float()), _sample(safe.float())) > weights.DISTANCE_DENSE:
            raise ConfigError(f"{key} {shape}: model= is not the safe checkpoint {inputs.safe.label}. Load that one.")
        if any(bool(v.any()) for v in found_vectors):
            vectors[key] = found_vectors
    return trained_logits(
        MaskedWeights(model, vectors, plan.granularity or "element", options), tokenizer, data, training
    )


def _sample(tensor: Tensor) -> Tensor:
    return weights.sample(tensor.reshape(tensor.shape[0], -1) if tensor.dim() > 1 else tensor.reshape(1, -1))


class _Job:
    """One streamed pass: every tensor is read once, and its figures are kept."""

    def __init__(self, inputs: Checkpoints, plan: FusePlan, options: FuseOptions, masks: Masks | None) -> None:
        self.inputs, self.plan, self.options, self.masks = inputs, plan, options, masks
        self.sources = (inputs.safe, *inputs.tasks)
        self.digests = [hashlib.sha256() for _ in self.sources]
        self.changed = [False for _ in inputs.tasks]
        self.rows: list[ModuleFusion] = []

    def pairs(self) -> Iterator[tuple[str, Tensor, Tensor, float | None, float | None]]:
        """`(key, safe, fused, density, kept)` of every fused tensor, in order.

        Raises:
            CheckpointError: masks that lack it, or have another shape.
        """
        from tqdm.auto import tqdm

        shapes = {planned.name: planned for planned in self.plan.modules}
        for key in tqdm(
            self.inputs.fused, desc="fusing", unit="tensor", disable=not self.options.progress, leave=False
        ):
            safe, vectors = self.inputs.vectors(key)
            for digest, tensor in zip(self.digests, (safe, *vectors), strict=True):
                digest.update(key.encode() + _sample(tensor.float()).numpy().tobytes())
            for index, vector in enumerate(vectors):
                self.changed[index] |= bool(vector.any())
            if not any(bool(vector.any()) for vector in vectors):
                yield key, safe, safe, None, None
                continue
            mask = None
            if self.masks is not None:
                if key not in self.masks.values or self.masks.values[key].numel() != shapes[key].logits:
                    found = tuple(self.masks.values[key].shape) if key in self.masks.values else "no entry"
                    raise CheckpointError(
                        f"{key} {tuple(safe.shape)}: the masks have {found}. Use masks of these checkpoints and of "
                        "this granularity."
                    )
                mask = self.masks[key]
            fused = dense_tensor(safe, vectors, mask, self.options, key)
            kept = (
                None
                if mask is None
                else share(
                    float((fused - safe).norm()),
                    float((dense_tensor(safe, vectors, None, self.options, key) - safe).norm()),
                )
            )
            yield key, safe, fused, None if mask is None else float(mask.mean()), kept

    def full(self, out: Path | None) -> FuseReport:
        """Full weights, in the safe checkpoint's precision, shard by shard."""
        headers = {key: self.inputs.safe.header(key) for key in self.inputs.safe.place}
        order = [*self.inputs.fused, *(key for key in headers if key not in self.inputs.fused)]
        sizes = {key: math.prod(headers[key][0]) * element_size(headers[key][1]) for key in order}
        with ExitStack() as stack:
            staging = None if out is None else stack.enter_context(target(out, INDEX))
            shards = None if staging is None else Shards(staging, sizes, self.options.max_shard_bytes)
            for key, _, fused, density, kept in self.pairs():
                self.rows.append(ModuleFusion(key, 0, density, kept, 0.0))
                if shards is not None:
                    shards.add(key, fused.to(self.inputs.safe.tensor(key).dtype))
            report = self._report()
            if staging is not None and shards is not None:
                for key in order[len(self.inputs.fused) :]:
                    shards.add(key, self.inputs.safe.tensor(key))
                copy_beside(self.inputs.safe.directory, staging)
                if self.masks is not None:
                    save_masks(self.masks, staging)
                (staging / CARD).write_text(
                    card_of(report.record, report.to_json()["modules"], "checkpoint"), encoding="utf-8"
                )
                shards.finish(report.record)
        return report

    def low_rank(self, out: Path | None) -> FuseReport:
        """A LoRA on the safe checkpoint; what it cannot hold is reported."""
        kind = self._model_type()
        if kind in TRANSPOSED:
            raise ConfigError(
                f"{self.inputs.safe.label}: {kind} stores its linear weights transposed. Leave rank= out, for full "
                "weights."
            )
        ranks = {planned.name: planned.rank for planned in self.plan.modules}
        factors, lost, whole = {}, 0.0, 0.0
        for key, safe, fused, density, kept in self.pairs():
            change = fused - safe
            energy = float(change.double().square().sum())
            whole += energy
            if not ranks[key] or energy == 0:
                lost += energy
                continue
            u, s, v = top_singular(change, ranks[key], seed=self.options.seed)
            a, b = s.sqrt()[:, None] * v.mT, u * s.sqrt()
            error = float((change - b @ a).norm()) / math.sqrt(energy)
            lost += error**2 * energy
            name = self.inputs.safe.renamed.get(key, key).removesuffix(
                ".weight"
            )  # an adapter's modules have the model's names
            factors[name] = (a, b)
            self.rows.append(ModuleFusion(name, a.shape[0], density, kept, error))
        report = self._report({"error": math.sqrt(lost / whole) if whole > 0 else 0.0})
        if not factors:
            raise ConfigError(
                f"{self.inputs.safe.label}: no linear weight was changed, so a LoRA has nothing to hold. Leave rank= "
                "out, for full weights."
            )
        covered = math.sqrt(lost / whole)
        warnings.warn(
            f"a LoRA of rank {self.options.rank} misses {covered:.1%} of the fused update (norms and embeddings "
            "included).",
            stacklevel=4,
        )
        report = dataclasses.replace(report, factors=factors)
        if out is not None:
            card = card_of(report.record, report.to_json()["modules"], "LoRA")
            write_adapter(
                out,
                factors,
                os.fspath(self.inputs.safe.label),
                {"task_type": "CAUSAL_LM"},
                self.masks,
                report.record,
                card,
            )
        return report

    def _model_type(self) -> str:
        path = self.inputs.safe.directory / "config.json"
        return str(files.read_json(path).get("model_type")) if path.is_file() else ""

    def _report(self, extra: dict[str, Any] | None = None) -> FuseReport:
        prints = [digest.hexdigest() for digest in self.digests]
        for source, changed, found in zip(self.inputs.tasks, self.changed, prints[1:], strict=True):
            if not changed:
                raise ConfigError(
                    f"{source.label} equals the safe checkpoint {self.inputs.safe.label}: there is no task vector. "
                    "Give the fine-tuned model."
                )
            if prints[1:].count(found) > 1:
                raise ConfigError(
                    f"{source.label} holds the same weights as another task. Give each checkpoint once; use weights "
                    "to count one more."
                )
        modules = tuple(self.rows)
        named = [
            {"name": public_name(s.label), "fingerprint": found} for s, found in zip(self.sources, prints, strict=True)
        ]
        granularity = {"granularity": self.plan.granularity} if self.plan.granularity else {}
        record = {
            "version": 1,
            **self.options.facts(len(self.inputs.tasks)),
            "layout": "checkpoints",
            **granularity,
            "safe": named[0],
            "tasks": named[1:],
        }
        record |= {**overall(modules, self.masks, {}), **(extra or {})}
        if self.masks is not None:
            record["mask"] = dict(self.masks.record)
        return FuseReport(self.plan, modules, record, masks=self.masks)
