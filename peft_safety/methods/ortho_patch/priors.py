"""Earlier patches: which directions of each layer they have taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from peft_safety import files, publish, weights
from peft_safety.artifact import ADAPTER_FILE, MANIFEST, PREFIX, PROTECTED_TYPES, check_adapter
from peft_safety.errors import ConfigError
from peft_safety.estimate.activations import model_name
from peft_safety.layers import stored_factors
from peft_safety.layers.adapters import adapter_layers
from peft_safety.methods.safe_lora.directory import read_factors
from peft_safety.naming import public_name
from peft_safety.projection import Side

Spans = dict[str, dict[Side, Tensor]]
Factors = Mapping[str, tuple[Tensor, Tensor]]


def prior_spans(
    model: nn.Module, layers: Mapping[str, nn.Module], priors: Sequence[str], sides: Sequence[Side]
) -> tuple[Spans, list[str]]:
    """Row spaces of `lora_A` (side "in") and column spaces of `lora_B` ("out") of earlier patches, side by side, for
    the layers of the new one.

    Args:
        layers: the new adapter's base layers by name.
        priors: names of adapters on the model, or directories of plain or protected LoRA adapters.

    Returns:
        `{module: {side: (d, sum of ranks)}}`, and the patches' names without paths.

    Raises:
        ConfigError: no such adapter, one of another base model, or one without an update in any of the layers.
    """
    here = {name for _, layer in model.named_modules() if isinstance(layer, LoraLayer) for name in layer.lora_A}
    spans: Spans = {}
    for prior in priors:
        factors = _loaded(model, prior) if prior in here else _stored(prior, model, layers)
        used = {
            name: pair
            for name, pair in factors.items()
            if name in layers and bool(pair[0].any()) and bool(pair[1].any())
        }
        if not used:
            raise ConfigError(
                f"prior patch {prior!r} changes none of the new adapter's {len(layers)} modules: there is nothing to "
                "be orthogonal to. Leave it out."
            )
        for name, (a, b) in used.items():
            for side in sides:
                columns = (a.mT if side == "in" else b).detach().cpu().float()
                old = spans.setdefault(name, {}).get(side)
                spans[name][side] = columns if old is None else torch.cat([old, columns], dim=1)
    return spans, [public_name(prior) for prior in priors]


def _loaded(model: nn.Module, name: str) -> Factors:
    return {
        module: stored_factors(layer.lora_A[name], layer.lora_B[name])
        for module, layer in adapter_layers(model, name).items()
    }


def _stored(directory: str, model: nn.Module, layers: Mapping[str, nn.Module]) -> Factors:
    path = Path(directory)
    publish.require_whole(path, ours=False)
    if not (path / MANIFEST).is_file():
        raise ConfigError(
            f"prior patch {directory!r} is neither an adapter on the model nor a directory with {MANIFEST}. Check the "
            "spelling."
        )
    fields = files.read_json(path / MANIFEST)
    if fields.get("peft_type") in PROTECTED_TYPES:
        stored = check_adapter(path)
        common = {name: layers[name] for name in stored.shapes if name in layers}
        stored.subspace.check_fits(common, (), bind=False)
        with files.open_tensors(path / ADAPTER_FILE) as handle:
            keys = {key.removeprefix(PREFIX): key for key in handle.keys()}  # noqa: SIM118
            kinds = ("weight", "initial") if stored.residual else ("weight",)
            read = {
                n: [[handle.get_tensor(keys[f"{n}.{f}.{kind}"]) for kind in kinds] for f in ("lora_A", "lora_B")]
                for n in common
            }
        factors: Factors = {name: (torch.cat(a), torch.cat(b, dim=1)) for name, (a, b) in read.items()}
    else:
        _, found = read_factors(path, fields)
        factors = {name: (factor.a, factor.b) for name, factor in found.items()}
        base, own = public_name(str(fields.get("base_model_name_or_path") or "")), model_name(model)
        if base and own and base.rpartition("/")[2] != own:
            raise ConfigError(
                f"prior patch {directory!r} was trained on {base}, this model is {own}. Give patches of one base "
                "model."
            )
    for name in (name for name in layers if name in factors):
        shape = (factors[name][1].shape[0], factors[name][0].shape[1])
        if shape != weights.shape(layers[name]):
            raise ConfigError(
                f"prior patch {directory!r}: its update of {name} is {shape}, the layer "
                f"{weights.shape(layers[name])}. Give patches of one base model."
            )
    return factors
