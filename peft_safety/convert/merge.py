"""Merging adapters into quantized weights. There are three ways; each reports what it does to the update.

- `"16bit"`: dense weights that hold `W + dW`, rounded once.
- `"nf4+residual"`: the quantized weights unchanged, and the update as one plain LoRA. Exact. (`Q(W + dW)` with the
  remainder as an adapter is not: the remainder is quantization noise of full rank.)
- `"nf4"`: `W + dW` quantized again. The 4-bit grid is coarser than most updates, so most of dW is rounded away. The
  rest leaks into the protected subspace. Refused unless forced.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from peft_safety.core import base_weights as weights
from peft_safety.core import kinds
from peft_safety.core.factor_forms import Form
from peft_safety.core.features import SAME_UPDATE, check_features
from peft_safety.core.names import lines, own_name, places
from peft_safety.core.plain_lora import plain_config
from peft_safety.core.projection import Side, coefficients
from peft_safety.errors import ConfigError, LossyMergeError
from peft_safety.layers.adapters import config_table, tables, weights_of
from peft_safety.methods.factors import layer_factors
from peft_safety.registry.protection import assert_protected, protected_configs, refuse_tied

MergeTo = Literal["16bit", "nf4+residual", "nf4"]
_DENSE = (torch.float32, torch.float16, torch.bfloat16)
ROUNDING = 0.01
"""Largest `||B A - dW||` by `||B|| ||A||`: rounding of factors in bf16 makes a few thousandths."""


@dataclass(frozen=True)
class MergedModule:
    """What a merge did: `norm` is `||dW|| / ||W||`, inf where W is zero. With the `change` of the stored weights,
    `kept` is `<change, dW> / ||dW||^2`, `error` is `||change - dW|| / ||dW||` (both nan for a zero update), and `leak`
    the worst side's `||U^T change|| / ||dW||`, None without a constraint.
    """

    module: str
    norm: float
    kept: float
    error: float
    leak: float | None


@dataclass(frozen=True)
class MergeResult:
    model: nn.Module
    to: MergeTo
    modules: list[MergedModule]

    def to_json(self) -> dict[str, Any]:
        rows = [asdict(row) for row in self.modules]
        for row in rows:
            row |= {name: None for name in ("norm", "kept", "error") if not math.isfinite(row[name])}
        return {"to": self.to, "modules": rows}

    def print(self, every_module: bool = False) -> None:
        """A plain table: a merge needs no package for printing. Medians by kind of module and over all, with the
        largest leak; or one row a module.
        """
        groups = lines(self.modules, lambda row: row.module, every_module)
        wide = max((len(label) for label, _ in groups), default=0)
        what = "" if every_module else " (medians by kind, largest leak)"
        print(f"merged into {self.to}{what}")
        print(f"{'module':{wide}} {'|dW| / |W|':>10} {'kept':>9} {'error':>9} {'leak':>9}")
        lost = False
        for label, rows in groups:
            norm = statistics.median(row.norm for row in rows)
            changed = [row for row in rows if not math.isnan(row.kept)]
            kept, error = (
                statistics.median(getattr(row, name) for row in changed) if changed else math.nan
                for name in ("kept", "error")
            )
            leak = max((row.leak for row in rows if row.leak is not None), default=None)
            text = "-" if leak is None else f"{leak:.2g}"
            print(f"{label:{wide}} {norm:10.2%} {kept:9.2%} {error:9.2%} {text:>9}")
            lost = lost or error > 1
        print("kept: share of the update dW that is in the weights; error: |what was added - dW| / |dW|")
        print("leak: part of what was added that lies in the protected subspace, by |dW| (-: none is stored)")
        if lost:
            bits = "4" if self.to == "nf4" else "16"
            print(f"error above 100 %: {bits} bits round away more than the update. Keep the adapter beside the base,")
            print("or merge to nf4+residual.")


@dataclass(frozen=True)
class _Part:
    """One layer to be merged: name, LoRA layer, base layer, update, and the bases of its constraint."""

    name: str
    layer: LoraLayer
    inner: nn.Module
    delta: Tensor
    bases: dict[Side, Tensor]

    def row(self, before: Tensor, after: Tensor) -> MergedModule:
        """Compare the dense fp32 weights `(out, in)` before and after the merge."""
        change, total, whole = after - before, float(self.delta.norm()), float(before.norm())
        if not total > 0:
            return MergedModule(own_name(self.name), total, math.nan, math.nan, None)
        norm = total / whole if whole else math.inf
        kept = float((change * self.delta).sum()) / total**2
        error = float((change - self.delta).norm()) / total
        leaks = [float(coefficients(u.to(change), change, side).norm()) / total for side, u in self.bases.items()]
        return MergedModule(own_name(self.name), norm, kept, error, max(leaks, default=None))


@torch.no_grad()
def merge_quantized(
    model: PeftModel,
    to: MergeTo = "16bit",
    *,
    dtype: torch.dtype = torch.bfloat16,
    force: bool = False,
    verbose: bool = True,
) -> MergeResult:
    """Merge the active adapters of a model with quantized weights; quantized layers without an adapter stay as they
    are.

    Args:
        model: with one or more active adapters.
        to: see the module's text; the result of "nf4+residual" is a PeftModel with one plain LoRA.
        dtype: of "16bit": all dense parameters of the model get it, or none if no merged layer was quantized. Rounding
            to bf16 moves the update by up to 0.4 % of the *weight*; float32 keeps the constraint.
        force: quantize again although most of the update is lost.
        verbose: print survival and leak of each module.

    Returns:
        A `MergeResult`: the merged model, and survival and leak of each module. Save it into a new directory: beside
        an adapter it would be loaded with that adapter, and the update would count twice.

    Raises:
        LossyMergeError: "nf4" without `force`, with the figures of the worst module; nothing was changed.
        ConfigError: adapters that trained other weights too or are more than a product of factors (DoRA, biases), one
            that is merged already, none that is active, or "nf4" for another weight.
    """
    if to not in get_args(MergeTo):
        raise ConfigError(f"merge to {to!r}. Use one of {', '.join(map(repr, get_args(MergeTo)))}.")
    base: nn.Module = model.get_base_model()
    names = _mergeable(model, base)
    for name in names:
        inner: nn.Module = base.get_submodule(name).get_base_layer()  # type: ignore[operator]
        weights.check_readable(inner, name)
        if to != "nf4+residual":
            refuse_tied(base, name, inner)
    if to == "nf4":
        _refuse_requantizing(model, base, names, force)
    quantized = any(weights.quantization(base.get_submodule(name).get_base_layer()) for name in names)  # type: ignore[operator]
    rows = []
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for name in names:
        part = _part(model, base, name)
        before = weights.dense_weight(part.inner, name)
        if to == "nf4+residual":
            pairs = [layer_factors(name, part.layer, adapter).scaled() for adapter in _active(part.layer)]
            a, b = torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], dim=1)
            factors[name] = a, b
            product, scale = (b.float() @ a.float()).to(before), float(a.float().norm() * b.float().norm())
            if float((product - part.delta).norm()) > ROUNDING * scale:
                raise ConfigError(f"{own_name(name)}: its update is no product of lora_A and lora_B. Use to='16bit'.")
            rows.append(part.row(before, before + product))
            continue
        merged = _requantized(part, before) if to == "nf4" else _dense(part, before, dtype if quantized else None)
        rows.append(part.row(before, weights.dense_weight(merged, name)))
        base.set_submodule(name, merged)
    if to == "16bit" and quantized:
        _cast(base, dtype)
    result = MergeResult(_with_plain(model, factors) if to == "nf4+residual" else _bare(base), to, rows)
    if verbose:
        result.print()
    return result


def _mergeable(model: PeftModel, base: nn.Module) -> list[str]:
    """Names of the LoRA layers in the base model that hold an active adapter."""
    configs = config_table(model)
    for field in ("modules_to_save", "trainable_token_indices", "target_parameters", "alora_invocation_tokens"):
        if any(getattr(config, field, None) for config in configs.values()):
            raise ConfigError(
                f"{field} cannot be merged here. Load the base in 16 bit and use merge_and_unload(), or keep the "
                "adapter beside the base."
            )
    layers = {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}
    active = {name: layer for name, layer in layers.items() if _active(layer)}
    if not active:
        raise ConfigError("no layer has an active adapter, so that nothing can be merged. Call set_adapter() first.")
    protected = protected_configs(model)
    for adapter in sorted({adapter for layer in active.values() for adapter in _active(layer)}):
        if adapter in protected:
            assert_protected(model, adapter)
        else:
            config = configs.get(adapter)
            start = getattr(config, "init_lora_weights", True)  # any: the update goes into the weight as it is now
            check_features(config, f"adapter {adapter!r}", inits=(start,), allowed=SAME_UPDATE)
    for name, layer in active.items():
        base_layer = layer.get_base_layer()
        if kinds.groups(base_layer) > 1 or not kinds.merges_exactly(base_layer):
            raise LossyMergeError(
                f"{name}: nothing is merged into a {type(base_layer).__name__}({base_layer.extra_repr()}), whose "
                "groups or padding lora_A does not have. Keep the adapter beside the base."
            )
    if any(layer.merged for layer in layers.values()):
        raise ConfigError("an adapter is merged into the base weights. Call unmerge_adapter() first.")
    return list(active)


def _active(layer: LoraLayer) -> list[str]:
    return [adapter for adapter in layer.active_adapters if adapter in tables(layer)[0]]


def _part(model: PeftModel, base: nn.Module, name: str) -> _Part:
    layer: LoraLayer = base.get_submodule(name)  # type: ignore[assignment]
    active, inner = _active(layer), layer.get_base_layer()
    delta = torch.zeros(weights.shape(inner), device=next(inner.parameters()).device)
    for adapter in active:
        update = layer.get_delta_weight(adapter).to(delta)
        if kinds.shape(inner) is not None:
            delta += kinds.as_matrix(inner, update)
        else:
            delta += update.T if getattr(layer, "fan_in_fan_out", False) else update
    # two subspaces bind two parts of a sum, not the sum
    config = protected_configs(model).get(active[0]) if len(active) == 1 else None
    bases = {} if config is None else {side: config.subspace.bases[own_name(name)][side] for side in config.sides}
    return _Part(name, layer, inner, delta, bases)


def _refuse_requantizing(model: PeftModel, base: nn.Module, names: list[str], force: bool) -> None:
    rows = []
    for part in (_part(model, base, name) for name in names):
        kind = weights.quantization(part.inner) or "dense"
        if kind != "4bit":
            raise ConfigError(
                f"{part.name}: a {kind} weight cannot be merged to 'nf4'. Use to='16bit', or to='nf4+residual'."
            )
        if not force:
            before = weights.dense_weight(part.inner, part.name)
            rows.append(part.row(before, weights.requantized(part.inner, part.delta, part.name)))
    worst = max((row for row in rows if not math.isnan(row.error)), key=lambda row: row.error, default=None)
    if worst is not None:
        leak = "" if worst.leak is None else f", and reach {worst.leak:.1%} of it into the protected subspace"
        raise LossyMergeError(
            f"{worst.module}: quantizing W + dW again would miss the update by {worst.error:.1%} of its norm (|dW| is "
            f"{worst.norm:.2%} of |W|){leak}. Use to='nf4+residual' (exact) or to='16bit', or force=True."
        )


def _dense(part: _Part, before: Tensor, dtype: torch.dtype | None) -> nn.Module:
    """`W + dW` in `dtype`, or in the layer's own: in the layer if it is dense already, in a new `nn.Linear` if not."""
    inner: Any = part.inner
    total = before + part.delta
    if weights.quantization(inner) is None:
        total = total.T if weights.is_conv1d(inner) else total
        total = kinds.as_stored(inner, total) if kinds.shape(inner) is not None else total
        total = total.to(dtype or inner.weight.dtype)
        inner.weight = nn.Parameter(total.contiguous(), requires_grad=False)
        return inner
    linear = nn.Linear(total.shape[1], total.shape[0], bias=inner.bias is not None, device="meta", dtype=dtype)
    linear.weight = nn.Parameter(total.to(dtype), requires_grad=False)
    if inner.bias is not None:
        linear.bias = nn.Parameter(inner.bias.data.to(dtype), requires_grad=False)
    return linear


def _cast(base: nn.Module, dtype: torch.dtype) -> None:
    """Give all dense parameters one dtype, but those that transformers keeps in fp32 in this dtype. A forward of
    several dtypes fails (after `prepare_model_for_kbit_training`, norms and embeddings are fp32).
    """
    fields = ["_keep_in_fp32_modules_strict"] + ["_keep_in_fp32_modules"] * (dtype == torch.float16)
    kept = {name for field in fields for name in getattr(base, field, None) or ()}
    for name, module in base.named_modules():
        if weights.quantization(module) is not None or kept & set(name.split(".")):
            continue
        for parameter in module._parameters.values():
            if type(parameter) is nn.Parameter and parameter.dtype in _DENSE:
                parameter.data = parameter.data.to(dtype)


def _requantized(part: _Part, before: Tensor) -> nn.Module:
    from bitsandbytes.nn import Params4bit

    old: Any = part.inner.weight
    state = old.quant_state
    new = Params4bit(
        (before + part.delta).to(state.dtype).cpu(),
        requires_grad=False,
        module=part.inner,
        quant_type=state.quant_type,
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_storage=old.quant_storage,
    )
    part.inner.weight = new.to(old.device)
    return part.inner


def _with_plain(model: PeftModel, factors: dict[str, tuple[Tensor, Tensor]]) -> nn.Module:
    """The model with one plain LoRA of these factors in place of its adapters; its base is not touched."""
    config = next(iter(config_table(model).values()))
    base = model.unload()
    pairs = {own_name(name): pair for name, pair in factors.items()}
    result = get_peft_model(base, plain_config(pairs, vars(config), places(base)))
    for name, (a, b) in factors.items():
        layer: Any = result.get_base_model().get_submodule(name)
        stored = Form.of(layer.get_base_layer()).stored(a, b)
        for weight, factor in zip(weights_of(layer, "default"), stored, strict=True):
            weight.data = factor.to(weight.device)
    return result.eval()


def _reads_4bit(conversion: Any) -> bool:
    """Whether it has read bitsandbytes' packed weights from a checkpoint: transformers 5.23 cannot revert that, and
    saves no such model, while one that was quantized on the way in is saved without it.
    """
    return any(
        type(step).__module__.endswith("bitsandbytes") for step in getattr(conversion, "operations", None) or ()
    )


def _bare(base: nn.Module) -> nn.Module:
    """The base model without adapters; its quantization config matches its layers, so that it can be saved."""
    for name, layer in reversed([(n, m) for n, m in base.named_modules() if isinstance(m, LoraLayer)]):
        base.set_submodule(name, layer.get_base_layer())  # its adapters are not active
    if hasattr(base, "peft_config"):
        del base.peft_config
    config: Any = getattr(base, "config", None)
    if conversions := getattr(base, "_weight_conversions", None):
        kept: Any = [conversion for conversion in conversions if not _reads_4bit(conversion)]
        base._weight_conversions = kept
    quantization = getattr(config, "quantization_config", None)
    if any(weights.quantization(module) for module in base.modules()):
        if quantization is not None:
            dense = [name for name, module in base.named_modules() if type(module) is nn.Linear]
            field = "llm_int8_skip_modules"
            setattr(quantization, field if hasattr(quantization, field) else "modules_to_not_convert", dense)
        return base
    if quantization is not None:
        del config.quantization_config
    cleared = {"is_quantized": False, "is_loaded_in_4bit": False, "is_loaded_in_8bit": False}
    for flag, value in {**cleared, "quantization_method": None, "hf_quantizer": None}.items():
        if hasattr(base, flag):
            setattr(base, flag, value)
    return base
