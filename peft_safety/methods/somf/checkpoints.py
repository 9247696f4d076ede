"""Fusing full checkpoints of transformers' models through a mask: another checkpoint.

Training a mask over full weights holds the model, the task vectors and the optimizer in memory anyway, so transformers
loads and saves here. Plain merges of checkpoints, streamed from disk, are mergekit's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peft_safety.core import base_weights as weights
from peft_safety.core import publish
from peft_safety.core.checkpoints import FLOATS, FileWeights
from peft_safety.errors import CheckpointError, ConfigError
from peft_safety.methods.somf.forward import MaskedWeights
from peft_safety.methods.somf.masks import mask_shape, rescaled
from peft_safety.methods.somf.options import FuseOptions
from peft_safety.methods.somf.report import FuseReport, distinct
from peft_safety.methods.somf.updates import task_arithmetic

CONFIG = "config.json"


class CheckpointFusion:
    """The safe model, and the task vectors of fine-tuned checkpoints, summed.

    Args:
        safe: its checkpoint; None where `model` is the safe model.

    Raises:
        ConfigError: both or neither of safe and model; a task that equals another input; a granularity that full
            weights cannot have.
        CheckpointError: checkpoints of another architecture, quantized, or not finite.
    """

    def __init__(self, safe: str | None, tasks: Sequence[str], model: nn.Module | None, options: FuseOptions) -> None:
        from transformers import AutoModelForCausalLM

        if (safe is None) == (model is None):
            raise ConfigError("full checkpoints need either safe=, a checkpoint, or model=, the safe model itself.")
        self.options, task_weights = options, options.weights_of(len(tasks))
        given: Any = model
        self.model = given if safe is None else _loaded(AutoModelForCausalLM, safe)
        own = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        label = safe or getattr(self.model.config, "_name_or_path", "") or "the model"
        digests = {label: _fingerprint(label, own)}
        vectors: dict[str, list[tuple[float, Tensor]]] = {name: [] for name in own}
        for path, weight in zip(tasks, task_weights, strict=True):
            parameters = dict(_loaded(type(self.model), path).named_parameters())
            digests[path] = _fingerprint(path, parameters)
            for name, parameter in own.items():
                if name not in parameters or parameters[name].shape != parameter.shape:
                    raise CheckpointError(f"{name}: {path} has no such tensor of {tuple(parameter.shape)}. {REMEDY}")
                dtype = torch.promote_types(parameter.dtype, torch.float32)
                vector = parameters[name].detach().to(parameter.device, dtype) - parameter.to(dtype)
                vectors[name].append((weight, vector))
        provenance = distinct(digests)
        self.vectors = {n: task_arithmetic(v) for n, v in vectors.items() if any(bool(x.any()) for _, x in v)}
        granularity = options.granularity or "element"
        shapes = {name: mask_shape(tuple(v.shape), granularity, name) for name, v in self.vectors.items()}
        facts = options.facts(granularity, task_weights) | {"layout": "checkpoints", "modules": len(shapes), "rank": 0}
        facts |= {"safe": provenance[0], "tasks": provenance[1:]}
        self.planned = FuseReport(facts, shapes if options.method == "somf" else {})

    def masked(self, _: nn.Module | None) -> MaskedWeights:
        """The model to train a mask on."""
        return MaskedWeights(self.model, self.vectors, self.planned.mask_shapes, self.options)

    @torch.no_grad()
    def fused(self, report: FuseReport, out: Path | None) -> FuseReport:
        """Write a checkpoint in the safe model's precision."""
        if out is None:
            return report
        fused = {}
        for name, parameter in self.model.named_parameters():
            if name in self.vectors:
                vector = self.vectors[name]
                if report.masks is not None:
                    vector = rescaled(vector, report.masks.of(name).to(vector.device), self.options.rescale)
                fused[id(parameter)] = (parameter + vector).to(parameter.dtype)
        stored = self.model.state_dict(keep_vars=True)  # tied weights stay one tensor
        with publish.publishing(out, CONFIG) as staging:
            self.model.save_pretrained(staging, state_dict={k: fused.get(id(v), v) for k, v in stored.items()})
            report.write(staging)
        return report


REMEDY = "Fuse 16-bit safetensors checkpoints of one architecture."


def _loaded(kind: Any, path: str) -> Any:
    """A checkpoint with all of its tensors and no others."""
    files = FileWeights(path)  # refuses pickles, missing shards and interrupted writes
    if any(key.endswith("weight") and files.header(key)[1] not in FLOATS for key in files.place):
        raise CheckpointError(f"{path} is quantized. {REMEDY}")
    try:
        model, info = kind.from_pretrained(path, dtype="auto", use_safetensors=True, output_loading_info=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be loaded: {error} {REMEDY}") from error
    wrong = [f"{problem.replace('_', ' ')} {sorted(names)[:3]}" for problem, names in info.items() if names]
    if wrong:
        raise CheckpointError(f"{path} holds different tensors than {type(model).__name__}: {wrong[0]}. {REMEDY}")
    return model.eval()


def _fingerprint(label: str, parameters: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, parameter in sorted(parameters.items()):
        if not parameter.is_floating_point():
            raise CheckpointError(f"{label}: {name} is quantized. {REMEDY}")
        if not bool(torch.isfinite(parameter).all()):
            raise CheckpointError(f"{label}: {name} {tuple(parameter.shape)} holds NaN or Inf. Use an intact one.")
        sample = weights.sample(parameter.detach().reshape(len(parameter), -1))
        digest.update(name.encode() + sample.float().numpy().tobytes())
    return digest.hexdigest()
