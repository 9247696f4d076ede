"""Earlier patches: which directions of each layer they have taken."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from peft_safety.calibration.models import model_name
from peft_safety.core import base_weights as weights
from peft_safety.core import kinds
from peft_safety.core.adapter_dir import check_adapter, protected_types
from peft_safety.core.names import listed, public_name
from peft_safety.core.plain_lora import MANIFEST, Factors, read_manifest, read_plain
from peft_safety.core.projection import Side
from peft_safety.core.snapshot import reading
from peft_safety.errors import ConfigError
from peft_safety.layers import stored_factors
from peft_safety.layers.adapters import adapter_layers
from peft_safety.methods.factors import protected_factors

Spans = dict[str, dict[Side, Tensor]]


def prior_spans(
    model: nn.Module, layers: Mapping[str, nn.Module], priors: Sequence[str], sides: Sequence[Side]
) -> tuple[Spans, list[str]]:
    """Row spaces of `lora_A` (side "in") and column spaces of `lora_B` ("out") of earlier patches, side by side, for
    the layers of the new one: `{module: {side: (d, sum of ranks)}}`; and the patches' names without paths.

    Args:
        layers: the new adapter's base layers by name.
        priors: names of adapters on the model, or directories of plain or protected LoRA adapters.
    """
    loaded = {name for _, layer in model.named_modules() if isinstance(layer, LoraLayer) for name in layer.lora_A}
    spans: Spans = {}
    for prior in priors:
        if prior in loaded:
            on = adapter_layers(model, prior)
            _check_linear(prior, on, layers)
            own = {n: (x.lora_A[prior], x.lora_B[prior]) for n, x in on.items() if prior in x.lora_A}
            factors = {name: Factors(*stored_factors(*leaves), math.nan) for name, leaves in own.items()}
        else:
            factors = _stored(prior, model, layers)
            _check_linear(prior, factors, layers)
        used = {name: f for name, f in factors.items() if name in layers and bool(f.a.any()) and bool(f.b.any())}
        if not used:
            unused = f"prior patch {prior!r} changes none of the new adapter's {len(layers)} modules"
            raise ConfigError(f"{unused}: there is nothing to be orthogonal to. Leave it out.")
        for name, factor in used.items():
            for side in sides:
                columns = (factor.a.mT if side == "in" else factor.b).detach().cpu().float()
                taken = spans.setdefault(name, {})
                taken[side] = torch.cat([taken[side], columns], dim=1) if side in taken else columns
    return spans, [public_name(prior) for prior in priors]


def _check_linear(prior: str, patched: Iterable[str], layers: Mapping[str, nn.Module]) -> None:
    """A ConfigError refuses an earlier patch of a convolution or an embedding that the new one targets, too."""
    unfit = [name for name in patched if name in layers and kinds.shape(layers[name]) is not None]
    if unfit:
        raise ConfigError(
            f"prior patch {prior!r}: {listed(unfit)} are no linear layers, and nothing is made orthogonal to it "
            "there. Leave them out of target_modules."
        )


def _stored(directory: str, model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, Factors]:
    what = f"prior patch {directory!r}"
    with reading(directory, warn=True) as path:
        factors = _read(path, what, model, layers)
    for name in [name for name in layers if name in factors]:
        shape, expected = (factors[name].b.shape[0], factors[name].a.shape[1]), weights.shape(layers[name])
        if shape != expected:
            raise ConfigError(
                f"{what}: its update of {name} is {shape}, the layer {expected}. Give patches of one base model."
            )
    return factors


def _read(path: Path, what: str, model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, Factors]:
    if not (path / MANIFEST).is_file():
        neither = f"neither an adapter on the model nor a directory with {MANIFEST}"
        raise ConfigError(f"{what} is {neither}. Check the spelling.")
    if read_manifest(path, warn=False).get("peft_type") in protected_types():
        stored = check_adapter(path)
        common = {name: layers[name] for name in stored.shapes if name in layers}
        stored.subspace.check_fits(common, (), bind=False)
        factors = protected_factors(stored, common)
    else:
        plain = read_plain(path, linear=False)
        factors = plain.factors
        base, own = public_name(plain.config.base_model_name_or_path or ""), model_name(model)
        if base and own and base.rpartition("/")[2] != own:
            raise ConfigError(f"{what} was trained on {base}, this model is {own}. Give patches of one base model.")
    return factors
