"""Fusing LoRA adapters of one base model into a plain LoRA: names on a PeftModel, or directories."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peft_safety.core import base_weights as weights
from peft_safety.core import features, plain_lora
from peft_safety.core.names import places, public_name
from peft_safety.core.plain_lora import Factors
from peft_safety.core.snapshot import reading
from peft_safety.core.targets import base_layers
from peft_safety.errors import ConfigError
from peft_safety.layers.adapters import adapter_layers, config_table
from peft_safety.methods.factors import layer_factors
from peft_safety.methods.safe_lora.apply import add_adapter
from peft_safety.methods.safe_lora.repair import factor_digest
from peft_safety.methods.somf.masks import Shape
from peft_safety.methods.somf.options import FuseOptions
from peft_safety.methods.somf.train import MaskedModel
from peft_safety.methods.somf.updates import Continued, Independent, MaskOf, Update

CONTINUED_COSINE = 0.2
"""Least cosine between the `lora_A` of a task and of the safe adapter that its training started from. Two random ones
are at 1 / sqrt(number of entries), below 0.01 for any real adapter; ordinary fine-tuning leaves it above 0.5."""
Pairs = Mapping[str, tuple[Tensor, Tensor]]


class Adapter(NamedTuple):
    label: str
    factors: dict[str, Factors]
    base: str | None  # None: the model at hand, or not known
    fields: dict[str, Any]


class AdapterFusion:
    """The adapters of one fusion, checked against each other; without `safe` the base model is the aligned one."""

    def __init__(self, safe: str | None, tasks: Sequence[str], model: nn.Module | None, options: FuseOptions) -> None:
        self.options, self.weights = options, options.weights_of(len(tasks))
        self.adapters = [_read(source, model) for source in (*([] if safe is None else [safe]), *tasks)]
        aligned, inputs = (None if safe is None else self.adapters[0]), self.adapters[-len(tasks) :]
        _check_alike(self.adapters, options)
        self.model_name = getattr(getattr(model, "config", None), "_name_or_path", None) or None
        continued = _is_continued(aligned, inputs, options)
        self.granularity = options.granularity or ("element" if continued else "rank")
        kind: Any = Continued if continued else Independent
        self.updates: dict[str, Update] = {}
        for name in self.adapters[0].factors:
            own = aligned and aligned.factors[name]
            weighted = [(weight, task.factors[name]) for weight, task in zip(self.weights, inputs, strict=True)]
            self.updates[name] = kind(name, own, weighted, self.granularity, options.rescale)
        self.mask_shapes = mask_shapes(self.updates)
        pairs = {a.label: {name: (f.a, f.b) for name, f in a.factors.items()} for a in self.adapters}
        self.fingerprints = {label: factor_digest(factors) for label, factors in pairs.items()}
        rank, layout = max(len(u.a) for u in self.updates.values()), "continued" if continued else "independent"
        self.facts = {"layout": layout, "modules": len(self.updates), "rank": rank}

    def masked(self, model: nn.Module | None) -> MaskedAdapters:
        if model is None:
            raise ConfigError("method='somf' trains a mask, which needs model=. Give it, or a trained mask=.")
        return MaskedAdapters(model, self.updates, self.options)

    def fused(self, mask_of: MaskOf | None) -> dict[str, tuple[Tensor, Tensor]]:
        """`(A, B)` by module, on the CPU, the scaling included in B."""
        pairs = {}
        for name, update in self.updates.items():
            a, b = update.factors(mask_of)
            dtype = functools.reduce(torch.promote_types, (a.factors[name].b.dtype for a in self.adapters))
            pairs[name] = (a.to("cpu", dtype), b.to("cpu", dtype))
        return pairs

    def write(self, out: Path, mask_of: MaskOf | None, more: Callable[[Path], None]) -> None:
        """Publish a plain LoRA that any PEFT loads, with what `more` writes: the model card among it."""
        pairs = self.fused(mask_of)
        plain_lora.write_plain(out, plain_lora.factor_tensors(pairs), self._config(pairs), "", more=more)

    def add(self, pairs: Pairs, model: PeftModel, name: str) -> None:
        add_adapter(model, name, self._config(pairs, places(model.get_base_model())), pairs)

    def _config(self, pairs: Pairs, existing: Mapping[str, str] | None = None) -> LoraConfig:
        base = next((a.base for a in self.adapters if a.base), self.model_name)
        return plain_lora.plain_config(pairs, {**self.adapters[0].fields, "base_model_name_or_path": base}, existing)


class MaskedAdapters(MaskedModel):
    """A model that computes with fused adapters: a hook adds `B A x` to the output of every target layer. The backward
    pass computes the mask again from the seed of its noise, so a step keeps nothing of the size of the factors.
    """

    def __init__(self, model: nn.Module, updates: Mapping[str, Update], options: FuseOptions) -> None:
        layers: dict[str, Any] = base_layers(model)
        for name, update in updates.items():
            shape = weights.shape(layers[name]) if name in layers else None
            if shape != (wanted := (len(update.b), update.a.shape[1])):
                raise ConfigError(f"{name}: the update is {wanted}, the layer {shape}. Give the adapters' base model.")
        super().__init__(model, mask_shapes(updates), options, layers[next(iter(updates))].weight.device)
        self.updates = [(layers[name], update.to(layers[name].weight.device)) for name, update in updates.items()]

    def _attach(self, stack: ExitStack) -> None:
        if isinstance(self.model, PeftModel):
            stack.callback(self.model.base_model.set_adapter, self.model.active_adapters)
            stack.enter_context(self.model.disable_adapter())
        for layer, update in self.updates:
            stack.callback(layer.register_forward_hook(functools.partial(self._add, update)).remove)

    def _add(self, update: Update, _: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        samples = self.samples()

        def fused(x: Tensor) -> Tensor:
            return apply(x, *update.factors(samples))

        change: Any
        if not self.fused:
            change = apply(inputs[0], *update.aligned())
        elif torch.is_grad_enabled():
            change = checkpoint(fused, inputs[0], use_reentrant=False, preserve_rng_state=False)
        else:
            change = fused(inputs[0])
        return output + change.to(output.dtype)


def apply(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`B A x`, in the dtype of the factors."""
    return F.linear(F.linear(x.to(a.dtype), a), b)


def mask_shapes(updates: Mapping[str, Update]) -> dict[str, Shape]:
    return {name: shape for update in updates.values() for name, shape in update.mask_shapes.items()}


def _read(source: str, model: nn.Module | None) -> Adapter:
    """An adapter of the model by its name, or one in a directory."""
    if model is not None and source in (table := config_table(model)):
        config = table[source]
        features.check_plain(config, f"adapter {source!r}")
        layers = adapter_layers(model, source, linear=True)
        own = {name: layer_factors(name, layer, source) for name, layer in layers.items()}
        adapter = Adapter(source, own, None, config.to_dict())
        extra = bool(config.modules_to_save or config.trainable_token_indices)
    else:
        with reading(source, warn=True) as path:
            plain = plain_lora.read_plain(path)
        adapter = Adapter(source, plain.factors, plain.fields.get("base_model_name_or_path") or None, plain.fields)
        extra = bool(plain.extra)
    factors = adapter.factors.values()
    if extra:
        raise ConfigError(f"{source} also trained modules_to_save or token rows, which are not fused. Train without.")
    if not all(math.isfinite(factor.scaling) for factor in factors):
        raise ConfigError(f"{source} gives lora_alpha by a regular expression. Save it with full module names.")
    if not any(bool(factor.a.any() and factor.b.any()) for factor in factors):
        raise ConfigError(f"{source}: its update is zero in all {len(factors)} modules. Give a trained adapter.")
    return adapter


def _check_alike(adapters: list[Adapter], options: FuseOptions) -> None:
    bases = {os.path.realpath(a.base) if os.path.isdir(a.base) else a.base: a for a in adapters if a.base is not None}
    if len(bases) > 1 and not options.ignore_base_names:
        (one, a), (two, b) = list(bases.items())[:2]
        names = f"{a.label} was trained on {public_name(one)!r}, {b.label} on {public_name(two)!r}"
        raise ConfigError(f"{names}. Fuse adapters of one base model; if these are the same, set ignore_base_names.")
    shapes = [{name: (len(f.b), f.a.shape[1]) for name, f in a.factors.items()} for a in adapters]
    for adapter, own in zip(adapters, shapes, strict=True):
        for name in sorted(own.keys() | shapes[0].keys()):
            if own.get(name) != shapes[0].get(name):
                shape, first = own.get(name, "(none)"), shapes[0].get(name, "(none)")
                both = f"{name}: {adapter.label} updates a weight {shape}, {adapters[0].label} one {first}"
                raise ConfigError(f"{both}. Fuse adapters of the same modules of one base model.")


def _is_continued(safe: Adapter | None, tasks: list[Adapter], options: FuseOptions) -> bool:
    """Whether the training of the tasks started from the safe adapter, so that A and B have task vectors."""
    if options.layout == "independent":
        return False
    reason = "there is no safe adapter to start from" if safe is None else next(_differences(safe, tasks), None)
    if reason and (options.layout == "continued" or options.granularity == "element"):
        needs = "layout='continued' and element masks need a difference of factors"
        raise ConfigError(f"{reason}; {needs}. Use granularity='rank', which independent adapters can have.")
    return reason is None


def _differences(safe: Adapter, tasks: list[Adapter]) -> Iterator[str]:
    for task in tasks:
        for name, factor in task.factors.items():
            aligned = safe.factors[name]
            if factor.a.shape != aligned.a.shape or not math.isclose(factor.scaling, aligned.scaling, rel_tol=1e-6):
                own, expected = (f"rank {len(f.a)} and scaling {f.scaling:g}" for f in (factor, aligned))
                yield f"{name}: {task.label} has {own}, the safe adapter {safe.label} {expected}"
        one, other = (torch.cat([a.factors[n].a.double().flatten().cpu() for n in task.factors]) for a in (task, safe))
        cosine = float(F.cosine_similarity(one, other, dim=0))
        if cosine < CONTINUED_COSINE:
            yield f"{task.label} was not trained on from {safe.label} (cosine of their lora_A {cosine:.2f})"
