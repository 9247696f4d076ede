"""Fusing LoRA adapters of one base model into a plain LoRA: names on a PeftModel, or directories."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

from peft_safety.core.names import places, public_name
from peft_safety.core.plain_lora import Factors, check_plain, factor_tensors, plain_config, read_plain, write_plain
from peft_safety.errors import ConfigError
from peft_safety.layers.adapters import adapter_layers, config_table
from peft_safety.methods.factors import layer_factors
from peft_safety.methods.safe_lora.apply import new_adapter
from peft_safety.methods.safe_lora.repair import factor_digest
from peft_safety.methods.somf.forward import MaskedAdapters
from peft_safety.methods.somf.options import FuseOptions
from peft_safety.methods.somf.report import FuseReport, distinct
from peft_safety.methods.somf.updates import Continued, Independent, Update

CONTINUED_COSINE = 0.2
"""Least cosine between the `lora_A` of a task and of the safe adapter that it was trained on from. Two random ones are
at 1 / sqrt(number of entries), below 0.01 for any real adapter; ordinary fine-tuning leaves it above 0.5."""


@dataclass(frozen=True)
class Adapter:
    """A plain LoRA adapter.

    Attributes:
        label: what the user called it.
        factors: by module, in the order of the file or the model.
        fields: its config.
        base: name of its base model, if it says so; None for an adapter of the model at hand.
    """

    label: str
    factors: dict[str, Factors]
    fields: dict[str, Any]
    base: str | None = None


class AdapterFusion:
    """The adapters of one fusion, checked against each other.

    Args:
        safe: None where the base model itself is the aligned one.

    Raises:
        ConfigError: different bases, modules or shapes, a task that equals another input, or a granularity that these
            adapters cannot have.
    """

    def __init__(self, safe: str | None, tasks: Sequence[str], model: nn.Module | None, options: FuseOptions) -> None:
        self.options, weights = options, options.weights_of(len(tasks))
        self.model_name: str | None = getattr(getattr(model, "config", None), "_name_or_path", None) or None
        self.adapters = [_read(name, model) for name in ([] if safe is None else [safe]) + list(tasks)]
        aligned, inputs = (None if safe is None else self.adapters[0]), self.adapters[-len(tasks) :]
        _check_bases(self.adapters, options)
        _check_modules(self.adapters)
        digests = [factor_digest({n: (f.a, f.b) for n, f in a.factors.items()}) for a in self.adapters]
        provenance = distinct(dict(zip([a.label for a in self.adapters], digests, strict=True)))
        continued = _is_continued(aligned, inputs, options)
        granularity = options.granularity or ("element" if continued else "rank")
        self.updates: dict[str, Update] = {}
        for name in self.adapters[0].factors:
            own = aligned and aligned.factors[name]
            weighted = [(weight, task.factors[name]) for weight, task in zip(weights, inputs, strict=True)]
            kind: Any = Continued if continued else Independent
            self.updates[name] = kind(name, own, weighted, granularity, options.rescale)
        shapes = {key: shape for update in self.updates.values() for key, shape in update.mask_shapes.items()}
        facts = options.facts(granularity, weights) | {
            "layout": "continued" if continued else "independent",
            "safe": {"name": "the base model", "fingerprint": ""} if safe is None else provenance[0],
            "tasks": provenance[-len(tasks) :],
            "modules": len(self.updates),
            "rank": max(update.rank for update in self.updates.values()),
        }
        self.planned = FuseReport(facts, shapes if options.method == "somf" else {})

    def masked(self, model: nn.Module | None) -> MaskedAdapters:
        """The model to train a mask on."""
        if model is None:
            raise ConfigError("method='somf' trains a mask, which needs model=. Give it, or a trained mask=.")
        return MaskedAdapters(model, self.updates, self.options)

    @torch.no_grad()
    def fused(self, report: FuseReport, out: Path | None) -> FuseReport:
        """Add the factors to the report; write a plain LoRA that any PEFT loads."""
        factors = {}
        for name, update in self.updates.items():
            a, b = update.factors(None if report.masks is None else report.masks.of)
            dtype = functools.reduce(torch.promote_types, (a.factors[name].b.dtype for a in self.adapters))
            factors[name] = (a.to("cpu", dtype), b.to("cpu", dtype))
        report = dataclasses.replace(report, factors=factors)
        if out is not None:
            write_plain(out, factor_tensors(factors), self._config(factors), report.card, more=report.write)
        return report

    def _config(self, factors: Mapping[str, tuple[Tensor, Tensor]], model: PeftModel | None = None) -> LoraConfig:
        """Of the fused factors, whose scaling is folded into B: `lora_alpha = r` in every module."""
        base = next((a.base for a in self.adapters if a.base), self.model_name)
        fields = {**self.adapters[0].fields, "base_model_name_or_path": base}
        return plain_config(factors, fields, None if model is None else places(model.get_base_model()))

    def add(self, report: FuseReport, model: PeftModel, name: str) -> None:
        """The result as one more adapter."""
        with new_adapter(model, name, self._config(report.factors, model)) as layers:
            for module, layer in layers.items():
                layer.lora_A[name].weight.copy_(report.factors[module][0])
                layer.lora_B[name].weight.copy_(report.factors[module][1])


def _read(source: str, model: nn.Module | None) -> Adapter:
    """An adapter of the model by its name, or one in a directory."""
    if model is not None and source in config_table(model):
        config = config_table(model)[source]
        check_plain(config, f"adapter {source!r}")
        factors = {name: layer_factors(name, layer, source) for name, layer in adapter_layers(model, source).items()}
        adapter = Adapter(source, factors, config.to_dict())
        extra = bool(config.modules_to_save or config.trainable_token_indices)
    else:
        plain = read_plain(Path(source))
        factors = plain.factors
        adapter = Adapter(source, factors, plain.fields, plain.fields.get("base_model_name_or_path") or None)
        extra = bool(plain.extra)
    if extra:
        raise ConfigError(f"{source} also trained modules_to_save or token rows, which are not fused. Train without.")
    if not all(math.isfinite(factor.scaling) for factor in factors.values()):
        raise ConfigError(f"{source} gives lora_alpha by a regular expression. Save it with full module names.")
    if not any(bool(factor.a.any() and factor.b.any()) for factor in factors.values()):
        raise ConfigError(f"{source}: its update is zero in all {len(factors)} modules. Give a trained adapter.")
    return adapter


def _check_bases(adapters: list[Adapter], options: FuseOptions) -> None:
    bases = {os.path.realpath(a.base) if os.path.isdir(a.base) else a.base: a for a in adapters if a.base is not None}
    if len(bases) > 1 and not options.ignore_base_names:
        (one, a), (two, b) = list(bases.items())[:2]
        raise ConfigError(
            f"{a.label} was trained on {public_name(one)!r}, {b.label} on {public_name(two)!r}. Fuse adapters of one "
            "base model; if these are the same, set ignore_base_names."
        )


def _check_modules(adapters: list[Adapter]) -> None:
    first, *others = ({name: (len(f.b), f.a.shape[1]) for name, f in a.factors.items()} for a in adapters)
    for adapter, shapes in zip(adapters[1:], others, strict=True):
        for name in sorted(first.keys() | shapes.keys()):
            if first.get(name) != shapes.get(name):
                raise ConfigError(
                    f"{name}: {adapter.label} updates a weight {shapes.get(name, '(none)')}, {adapters[0].label} one "
                    f"{first.get(name, '(none)')}. Fuse adapters of the same modules of one base model."
                )


def _is_continued(safe: Adapter | None, tasks: list[Adapter], options: FuseOptions) -> bool:
    """Whether A and B of the tasks have task vectors against those of the safe adapter."""
    if options.layout == "independent":
        return False
    reason = _why_independent(safe, tasks)
    if reason and (options.layout == "continued" or options.granularity == "element"):
        raise ConfigError(
            f"{reason}, and layout='continued' and element masks need a difference of factors. Use "
            "granularity='rank', which gates the rank components of independent adapters."
        )
    return not reason


def _why_independent(safe: Adapter | None, tasks: list[Adapter]) -> str:
    """What speaks against tasks that were trained on from the safe adapter; empty where nothing does."""
    if safe is None:
        return "there is no safe adapter that the tasks were trained on from"
    for task in tasks:
        for name, factor in task.factors.items():
            aligned = safe.factors[name]
            if factor.a.shape != aligned.a.shape or not math.isclose(factor.scaling, aligned.scaling, rel_tol=1e-6):
                own, expected = (f"rank {len(f.a)} and scaling {f.scaling:g}" for f in (factor, aligned))
                return f"{name}: {task.label} has {own}, the safe adapter {safe.label} {expected}"
        one, other = (torch.cat([a.factors[n].a.double().flatten().cpu() for n in task.factors]) for a in (task, safe))
        cosine = float(torch.nn.functional.cosine_similarity(one, other, dim=0))
        if cosine < CONTINUED_COSINE:
            return f"{task.label} was not trained on from {safe.label} (cosine of their lora_A {cosine:.2f})"
    return ""
