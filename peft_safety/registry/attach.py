"""From freshly built LoRA layers to protected ones."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import Tensor, nn

from peft_safety.calibration.leaving_out import warn_left_out
from peft_safety.core import kinds
from peft_safety.core.names import listed
from peft_safety.core.parameters import bases_of, check_sides, place_of
from peft_safety.core.projection import Side
from peft_safety.errors import SubspaceError, UnsupportedLayerError
from peft_safety.layers import ProtectedLinear
from peft_safety.layers.adapters import adapter_layers, tables
from peft_safety.layers.factor_table import FactorTable
from peft_safety.layers.shared_bases import rebase
from peft_safety.methods.base import ProtectedConfig
from peft_safety.registry import frozen, fused, reuse, velora
from peft_safety.registry.lora_layers import adopt


def attach(
    model: nn.Module, adapter_name: str, config: ProtectedConfig, configs: Mapping[str, Any]
) -> Collection[str]:
    """Put the protected leaves into freshly built LoRA layers. Returns the layers that the subspace leaves out."""
    has_leaves = bool(config.sides) or config.freezes
    layers = adapter_layers(model, adapter_name, packed=has_leaves and not config.residual, frozen=config.freezes)
    if not layers:
        raise UnsupportedLayerError(
            f"target_modules={config.target_modules!r} gave no LoRA layer. Use names of linear layers."
        )
    _check_kinds(layers, config)
    fused.opt(layers, adapter_name, config.fused)
    config._parameters = {n: x.parameter_name for n, x in layers.items() if isinstance(x, ParamWrapper)}
    base = bases_of(layers)
    if config.freezes and frozen.reuse_factors(layers, adapter_name, config, configs):
        return ()
    copied = not config.freezes and reuse.is_copy(config, configs) and reuse.fits(config, base)
    if not copied:
        reuse.start_over(config)
    asked = reuse.settings(config)
    subspace = config.subspace if copied else config.resolve(model, base)
    reasons = subspace.left_out
    left_out = {name: reasons[name] for name in subspace.lacking(layers, config.basis_sides) if name in reasons}
    if len(left_out) == len(layers):
        what = f"{listed(left_out)}: the subspace leaves out every layer of the adapter"
        raise SubspaceError(f"{what}. Use other target_modules, or calibrate on other data.")
    if left_out:
        _check_whole(left_out, layers)
        config._partial = True
        warn_left_out(left_out, len(layers), "the adapter, which does not train them")
        layers, base = (
            {name: value for name, value in table.items() if name not in left_out} for table in (layers, base)
        )
    subspace.check_fits(base, config.basis_sides)
    check_sides(base, subspace.provenance.get("observed") or ())
    if free := config.unconstrained:
        warnings.warn(
            f"modules_to_save and trainable_token_indices train weights that no projection constrains ({free}); the "
            f"guarantee covers the LoRA update of {len(layers)} modules only.",
            stacklevel=2,
        )
    config.subspace = subspace
    config._modules = reuse.sizes(layers, adapter_name)
    bind(layers, adapter_name, config, fold=config._stored is None)  # stored factors come next
    if config.freezes:
        frozen.start(model, layers, adapter_name, config)
        if isinstance(asked["subspace"], (str, os.PathLike)) and asked["subspace"] != "auto":
            config.subspace = asked["subspace"]  # the bases are needed no more, and can be read again
    else:
        reuse.start(model, layers, adapter_name, config, configs, copied)
    if not copied:
        loaded = config._stored is not None or (config._origin is not None and config._origin.loaded)
        reuse.remember(config, asked, loaded=loaded)
    return left_out


def _check_kinds(layers: Mapping[str, LoraLayer], config: ProtectedConfig) -> None:
    """An UnsupportedLayerError refuses what a convolution or an embedding cannot have."""
    for name, layer in layers.items():
        base: Any = layer.get_base_layer()
        if kinds.shape(base) is None:
            continue
        where = f"{name}: {type(base).__name__}({base.extra_repr()})"
        if config.residual:
            raise UnsupportedLayerError(
                f"{where} has no factors to start from other than LoRA's own. Use init='lora', or leave it out of "
                "target_modules."
            )
        if kinds.is_embedding(base) and "window" in config.sides:
            raise UnsupportedLayerError(
                f"{where} gets tokens, and a window of few directions would train few of them. Use "
                "train='B' or 'A', or leave it out of target_modules."
            )
        if kinds.is_embedding(base) and getattr(config, "target_modules_to_tie", None):
            raise UnsupportedLayerError(
                f"{where} is tied: with ensure_weight_tying the output embedding gets its factors, transposed, and "
                "no basis constrains those. Leave out ensure_weight_tying, or the embedding."
            )


def _check_whole(left_out: Collection[str], layers: Collection[str]) -> None:
    """An UnsupportedLayerError refuses to leave out some of what PEFT adapts of one layer: all has one place."""
    places = {place_of(name) for name in left_out}
    kept = [name for name in layers if name not in left_out and place_of(name) in places]
    if kept:
        raise UnsupportedLayerError(
            f"{listed(kept)}: the subspace leaves out another part of the same layer, and PEFT adapts all of it or "
            "nothing. Leave the layer out of the targets, or calibrate on data that reach all of it."
        )


def bind(layers: Mapping[str, LoraLayer], adapter_name: str, config: ProtectedConfig, *, fold: bool = True) -> None:
    """Replace the factors by leaves with the config's bases, or give existing leaves these bases, and fold them."""
    existing: dict[ProtectedLinear, Tensor | None] = {}
    for name, layer in layers.items():
        adopt(layer)
        for factor, side, basis in sides(layer, config, name):
            if isinstance(factor, nn.ParameterDict):
                assert basis is not None
                FactorTable.of(factor).constrain(adapter_name, basis, side)
                continue
            old = factor[adapter_name]
            if isinstance(old, ProtectedLinear):
                existing[old] = basis
            else:
                factor[adapter_name] = ProtectedLinear.replacing(old, basis, side, residual=config.residual)
        velora.adopt(layer, adapter_name)
    rebase(existing)
    for name, layer in layers.items() if fold else ():
        for factor, _, _ in sides(layer, config, name):
            if isinstance(factor, FactorTable):
                factor.fold(adapter_name)
            else:
                factor[adapter_name].fold()


def sides(layer: LoraLayer, config: ProtectedConfig, name: str) -> Iterator[tuple[Any, Side, Tensor | None]]:
    """The factors of a layer that are leaves, with side and basis: constrained ones, and with a residual both."""
    a, b = tables(layer)
    pairs: tuple[tuple[Any, Side], ...] = ((a, config.a_side), (b, "out"))
    for factor, side in pairs:
        if side in config.sides:
            yield factor, side, config.subspace.bases[name][side]
        elif config.residual:
            yield factor, side, None
