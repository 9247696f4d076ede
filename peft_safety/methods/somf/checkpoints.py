"""Fusing full checkpoints of transformers' models, which transformers loads and saves, into another checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from peft_safety.core import base_weights as weights
from peft_safety.core import publish
from peft_safety.core.checkpoints import FLOATS, FileWeights
from peft_safety.core.projection import all_finite
from peft_safety.errors import CheckpointError, ConfigError
from peft_safety.methods.somf.masks import mask_shape, rescaled
from peft_safety.methods.somf.options import FuseOptions
from peft_safety.methods.somf.train import MaskedModel
from peft_safety.methods.somf.updates import MaskOf, task_arithmetic

CONFIG = "config.json"
REMEDY = "Fuse 16-bit safetensors checkpoints of one architecture."


class CheckpointFusion:
    """The safe model (a checkpoint, or `model` itself), and the task vectors of fine-tuned checkpoints, summed."""

    def __init__(self, safe: str | None, tasks: Sequence[str], model: nn.Module | None, options: FuseOptions) -> None:
        if (safe is None) == (model is None):
            raise ConfigError("full checkpoints need either safe=, a checkpoint, or model=, the safe model itself.")
        self.granularity = options.granularity or "element"
        if self.granularity == "rank":
            raise ConfigError("granularity='rank' needs LoRA adapters, not full weights. Use element, row or module.")
        self.options, self.weights = options, options.weights_of(len(tasks))
        given: Any = model
        self.model = given if safe is None else _loaded(AutoModelForCausalLM, safe)
        own = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        label = safe or getattr(self.model.config, "_name_or_path", "") or "the model"
        self.fingerprints = {label: _fingerprint(label, own)}
        vectors: dict[str, list[tuple[float, Tensor]]] = {name: [] for name in own}
        for path, weight in zip(tasks, self.weights, strict=True):
            parameters = dict(_loaded(type(self.model), path).named_parameters())
            self.fingerprints[path] = _fingerprint(path, parameters)
            if more := sorted(parameters.keys() - own.keys()):
                tied = "which the safe model does not have, or ties to another"
                raise CheckpointError(f"{path} has {more[0]}, {tied}: it would be left out. {REMEDY}")
            for name, parameter in own.items():
                if name not in parameters or parameters[name].shape != parameter.shape:
                    raise CheckpointError(f"{name}: {path} has no such tensor of {tuple(parameter.shape)}. {REMEDY}")
                dtype = torch.promote_types(parameter.dtype, torch.float32)
                vector = parameters[name].detach().to(parameter.device, dtype) - parameter.to(dtype)
                vectors[name].append((weight, vector))
        self.vectors = {n: task_arithmetic(v) for n, v in vectors.items() if any(bool(x.any()) for _, x in v)}
        self.mask_shapes = {name: mask_shape(vector, self.granularity) for name, vector in self.vectors.items()}
        self.facts = {"layout": "checkpoints", "modules": len(self.vectors), "rank": 0}

    def masked(self, _: nn.Module | None) -> MaskedModel:
        return MaskedWeights(self)

    def fused(self, mask_of: MaskOf | None) -> dict[str, Tensor]:
        """`theta_s + masked(V)` in the model's precision, of every parameter that a task changed."""
        own, fused = dict(self.model.named_parameters()), {}
        for name, vector in self.vectors.items():
            if mask_of is not None:
                vector = rescaled(vector, mask_of(name).to(vector.device), self.options.rescale)
            fused[name] = (own[name] + vector).to(own[name].dtype)
        return fused

    def write(self, out: Path, mask_of: MaskOf | None, more: Callable[[Path], None]) -> None:
        own = dict(self.model.named_parameters())
        changed = {id(own[name]): tensor for name, tensor in self.fused(mask_of).items()}
        state = self.model.state_dict(keep_vars=True)  # tied weights are one tensor, and stay so
        with publish.publishing(out, CONFIG) as folder:
            self.model.save_pretrained(folder, state_dict={key: changed.get(id(v), v) for key, v in state.items()})
            more(folder)


class MaskedWeights(MaskedModel):
    """The safe model with the fused parameters in place of its own."""

    def __init__(self, fusion: CheckpointFusion) -> None:
        device = next(fusion.model.parameters()).device
        super().__init__(fusion.model, fusion.mask_shapes, fusion.options, device)
        self.fusion = fusion

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        parameters = self.fusion.fused(self.samples()) if self.fused else {}
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        return torch.func.functional_call(self.model, parameters, args=(), kwargs=inputs)


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
        if not all_finite(parameter):
            raise CheckpointError(f"{label}: {name} {tuple(parameter.shape)} holds NaN or Inf. Use an intact one.")
        sample = weights.sample(parameter.detach().reshape(len(parameter), -1))
        digest.update(name.encode() + sample.float().numpy().tobytes())
    return digest.hexdigest()
