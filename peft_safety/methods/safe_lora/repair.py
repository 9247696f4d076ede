"""The repair itself: factors and two sources of weights give new factors and a report."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from peft_safety.core import base_weights as weights
from peft_safety.core.checkpoints import NOISE, Matrix, Weights
from peft_safety.core.names import public_name
from peft_safety.core.plain_lora import Factors
from peft_safety.errors import CheckpointError, ConfigError
from peft_safety.methods.safe_lora.config import RepairOptions
from peft_safety.methods.safe_lora.delta import Delta, projected

RECORD_VERSION = 1
UNCONSTRAINED = "unconstrained"
"""The record's key for names of trained tensors that are no factors and stay as they are, if there are any."""
SAMPLED_COLUMNS = 256
"""Columns that a fingerprint is taken from. Changing it makes the fingerprints of older records differ."""


@dataclass(frozen=True)
class ModuleRepair:
    """What happened to one module.

    Attributes:
        cos: `<C B A, B A> / (||C B A|| ||B A||)` in [0, 1]; NaN without an update or an alignment direction.
        gain: `||B' A|| / ||B A||` if it is (or were) replaced; NaN without an update.
        kept_norm: `||s B A||` afterwards.
        delta: `||V|| / ||W_aligned||`.
        k: rank of the projector, for "topk" and "soft".
    """

    name: str
    cos: float
    selected: bool
    gain: float
    kept_norm: float
    delta: float
    k: int | None


@dataclass(frozen=True)
class RepairReport:
    """Every module in order; and the record that is stored with a repaired adapter: options, models, digests, and what
    the adapter trains beside its factors (`unconstrained`).
    """

    modules: tuple[ModuleRepair, ...]
    record: dict[str, Any]

    @property
    def selected(self) -> list[str]:
        return [module.name for module in self.modules if module.selected]

    def to_json(self) -> dict[str, Any]:
        """Plain values; NaN becomes None."""
        rows = [asdict(module) for module in self.modules]
        for row in rows:
            row |= {key: None for key, value in row.items() if isinstance(value, float) and math.isnan(value)}
        return {**self.record, "modules": rows}


@torch.no_grad()
def repair(
    factors: Mapping[str, Factors],
    unaligned: Weights,
    aligned: Weights,
    options: RepairOptions,
    base: Weights | None = None,
) -> tuple[dict[str, Tensor], RepairReport]:
    """New `lora_B` of the selected modules, on the CPU in the old one's dtype, and the report. `base` is the model
    that the adapter was trained on, where it is at hand and not `aligned` itself; the two are compared.

    Raises:
        CheckpointError: a missing weight or one of another shape, not finite, quantized; nothing differs between the
            models; `base` is another model.
        ConfigError: more modules asked for than there are.
    """
    from tqdm.auto import tqdm

    if options.select == "number" and (options.num_modules or 0) > len(factors):
        raise ConfigError(f"num_modules={options.num_modules}, but the adapter has {len(factors)} modules. Use fewer.")
    rows: dict[str, ModuleRepair] = {}
    projections: dict[str, Tensor] = {}
    noise: dict[str, float] = {}
    sources, prints = (aligned, unaligned), (hashlib.sha256(), hashlib.sha256())
    for name, factor in tqdm(factors.items(), desc="Safe LoRA", unit="module", disable=not options.progress):
        with ExitStack() as stack:
            pair = [stack.enter_context(source.open(name, factor.transposed)) for source in sources]
            for source, matrix, digest in zip(sources, pair, prints, strict=True):
                _check_matrix(matrix, name, factor, source.label, options)
                digest.update(name.encode() + sample(matrix).numpy().tobytes())
            if base is not None:
                _check_base(name, pair[0], stack.enter_context(base.open(name, factor.transposed)), aligned.label)
            rows[name], projections[name], noise[name] = _module(name, factor, pair[0], pair[1], options)
    if all(row.delta == 0 for row in rows.values()):
        both = f"{aligned.label} and {unaligned.label}"
        raise CheckpointError(f"{both} have equal weights in every module of the adapter. Give two different models.")
    worst = max(noise, key=noise.__getitem__)
    if noise[worst] > 0:
        expected = f"rounding noise is expected at {noise[worst]:.2g} times ||V|| in {worst} (the worst)"
        warnings.warn(f"V comes from quantized weights: {expected}.", stacklevel=3)
    chosen = select(list(rows.values()), options)
    for name in chosen:
        gain = 1.0 if math.isnan(rows[name].gain) else rows[name].gain
        rows[name] = replace(rows[name], selected=True, kept_norm=rows[name].kept_norm * gain)
    new = {name: projections[name].to("cpu", factors[name].b.dtype) for name in factors if name in chosen}
    models = {
        which: {"name": public_name(source.label), "fingerprint": digest.hexdigest()}
        for which, source, digest in zip(("aligned", "unaligned"), sources, prints, strict=True)
    }
    facts: dict[str, Any] = {"modules": len(rows), "repaired": len(new)}
    facts["digest"] = factor_digest({name: (f.a, new.get(name, f.b)) for name, f in factors.items()})
    facts["scaling"] = scaling_digest(factors)
    record = {"version": RECORD_VERSION, **options.facts(), **models, **facts}
    return new, RepairReport(tuple(rows.values()), record)


def factor_digest(factors: Mapping[str, tuple[Tensor, Tensor]]) -> str:
    """sha256 over `(A, B)` of every module, in fp32: what a later reader compares with the record."""
    digest = hashlib.sha256()
    for name in sorted(factors):
        digest.update(name.encode())
        for tensor in factors[name]:
            digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def scaling_digest(factors: Mapping[str, Factors]) -> str:
    """sha256 over the scaling of every module. One that only a regular expression says is unknown, and left out."""
    known = {name: repr(float(f.scaling)) for name, f in sorted(factors.items()) if not math.isnan(f.scaling)}
    return hashlib.sha256(repr(known).encode()).hexdigest()


def select(rows: list[ModuleRepair], options: RepairOptions) -> set[str]:
    """Names of the modules to repair. One without a cosine is taken last, never by a threshold, always by "zero"."""
    zeroed = {row.name for row in rows if row.delta == 0 and options.zero_delta == "zero"}
    cos = {
        row.name: math.inf if math.isnan(row.cos) else row.cos for row in rows if row.delta > 0 or row.name in zeroed
    }
    if options.select == "all":
        return set(cos)
    if options.select == "threshold":
        return zeroed | {name for name, value in cos.items() if value < options.threshold}
    ordered = sorted(cos, key=cos.__getitem__)  # stable: equal cosines in the adapter's order
    return zeroed | set(ordered[: options.num_modules])


def _module(
    name: str, factor: Factors, aligned: Matrix, unaligned: Matrix, options: RepairOptions
) -> tuple[ModuleRepair, Tensor, float]:
    """One module before the selection, its projected factor, and its expected quantization noise relative to V."""
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    delta = Delta(name, aligned, unaligned, options.dtype, device)
    b = factor.b.detach().to(device, options.dtype)
    new, inside, k = projected(delta, b, options)
    if delta.energy == 0 and options.zero_delta == "error":
        equal = f"{name}: the aligned and the unaligned weight are equal"
        raise CheckpointError(f"{equal}. Check the pair, or choose zero_delta='keep' or 'zero'.")
    root = torch.linalg.qr(factor.a.detach().to(device, torch.float64).mT, mode="r").R.mT  # ||X A|| = ||X R^T||
    old, after, projection = (x.double() @ root for x in (b, new, inside))
    norm, length, v = float(old.norm()), float(projection.norm()), math.sqrt(delta.energy)
    nothing_left = 0.0 if norm > 0 and v > 0 else math.nan  # an update wholly outside the alignment direction
    cos = float((projection * old).sum()) / (norm * length) if norm * length > 0 else nothing_left
    gain = float(after.norm()) / norm if norm > 0 else math.nan
    noise = math.hypot(*(NOISE.get(m.quantization or "", 0.0) for m in (aligned, unaligned))) * delta.base_norm
    share = v / delta.base_norm if delta.base_norm > 0 else math.inf if v > 0 else 0.0
    return ModuleRepair(name, cos, False, gain, factor.scaling * norm, share, k), new, noise / v if v > 0 else 0.0


def _check_matrix(matrix: Matrix, name: str, factor: Factors, label: str, options: RepairOptions) -> None:
    wanted = (factor.b.shape[0], factor.a.shape[1])
    if matrix.shape != wanted:
        shapes = f"{label}: the weight of {name} is {matrix.shape}, the adapter's update {wanted}"
        raise CheckpointError(f"{shapes}. Give models of its architecture.")
    if matrix.quantization is not None and not options.allow_quantized_delta:
        noise = f"{matrix.quantization}: rounding moves it by about {NOISE[matrix.quantization]:.0%} of its norm"
        remedy = "Give a 16-bit checkpoint (aligned=...), or insist with allow_quantized_delta=True."
        raise CheckpointError(f"{label}: the weight of {name} is {noise}, as an alignment or more. {remedy}")


def _check_base(name: str, aligned: Matrix, base: Matrix, label: str) -> None:
    limit = weights.DISTANCE_QUANTIZED if base.quantization or aligned.quantization else weights.DISTANCE_DENSE
    distance = weights.distance(sample(base), sample(aligned)) if base.shape == aligned.shape else math.inf
    if not distance <= limit:
        far = f"relative distance of the fingerprints {distance:.3g}, limit {limit:g}"
        raise CheckpointError(f"{name}: {label} is not the model the adapter was trained on ({far}). Give that model.")


def sample(matrix: Matrix) -> Tensor:
    """Fingerprint of a weight from its first columns, fp32, `(SAMPLES,)`."""
    return weights.sample(matrix.block(0, min(SAMPLED_COLUMNS, matrix.shape[1]))).float()
