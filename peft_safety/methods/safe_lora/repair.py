"""The repair itself: from factors by module name and two sources of weights to new factors and a report. Knows neither
PEFT models nor directories.
"""

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
from peft_safety.methods.safe_lora.delta import Delta, projected, sample
from peft_safety.methods.safe_lora.options import RepairOptions

RECORD_VERSION = 1


@dataclass(frozen=True)
class ModuleRepair:
    """What happened to one module.

    Attributes:
        cos: `<C B A, B A> / (||C B A|| ||B A||)` in [0, 1]; NaN where it has no meaning (no update, or no alignment
            direction).
        selected: whether its factor was replaced.
        gain: `||B' A|| / ||B A||` if it is (or were) replaced: how much of the update's length is left; NaN without an
            update.
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
    """Every module in order, and what decided the result.

    Attributes:
        record: what is stored with a repaired adapter: options, both models' names and fingerprints, number of
            modules, digest of the factors.
    """

    modules: tuple[ModuleRepair, ...]
    record: dict[str, Any]

    @property
    def selected(self) -> list[str]:
        """Names of the repaired modules."""
        return [module.name for module in self.modules if module.selected]

    def to_json(self) -> dict[str, Any]:
        """Plain values; NaN becomes None."""
        rows = [
            {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in asdict(module).items()}
            for module in self.modules
        ]
        return {**self.record, "modules": rows}


@torch.no_grad()
def repair(
    factors: Mapping[str, Factors],
    unaligned: Weights,
    aligned: Weights,
    options: RepairOptions,
    base: Weights | None = None,
) -> tuple[dict[str, Tensor], RepairReport]:
    """New `lora_B` of the selected modules, on the CPU in the old one's dtype, and the report. The inputs are not
    changed.

    Args:
        base: weights of the model that the adapter was trained on, where they are at hand and not `aligned` itself;
            compared with those.

    Raises:
        CheckpointError: a missing weight or one of another shape, not finite, quantized; nothing differs between the
            models; `base` is another model.
        ConfigError: more modules asked for than there are.
    """
    from tqdm.auto import tqdm

    if options.select == "number" and (options.num_modules or 0) > len(factors):
        raise ConfigError(
            f"num_modules={options.num_modules}, but the adapter has {len(factors)} modules. Use at most that."
        )
    rows: dict[str, ModuleRepair] = {}
    projections: dict[str, Tensor] = {}
    prints, noise = (hashlib.sha256(), hashlib.sha256()), []
    for name, factor in tqdm(factors.items(), desc="Safe LoRA", unit="module", disable=not options.progress):
        with ExitStack() as stack:
            pair = [stack.enter_context(source.open(name, factor.transposed)) for source in (aligned, unaligned)]
            _check_pair(name, factor, pair, (aligned, unaligned), options)
            if base is not None:
                _check_base(name, pair[0], stack.enter_context(base.open(name, factor.transposed)), aligned.label)
            rows[name], projections[name], noisy = _module(name, factor, pair, options)
            noise.append(noisy)
            for digest, matrix in zip(prints, pair, strict=True):
                digest.update(name.encode() + sample(matrix).numpy().tobytes())
    if all(row.delta == 0 for row in rows.values()):
        raise CheckpointError(
            f"{aligned.label} and {unaligned.label} have equal weights in every module of the adapter. Give two "
            "different models."
        )
    chosen = select(list(rows.values()), options)
    _warn_of_noise(noise)
    modules = tuple(_outcome(row, name in chosen) for name, row in rows.items())
    new = {name: projections[name].to("cpu", factors[name].b.dtype) for name in factors if name in chosen}
    after = {name: new.get(name, factors[name].b) for name in factors}
    record = {
        "version": RECORD_VERSION,
        **options.facts(),
        "modules": len(modules),
        "repaired": len(new),
        "aligned": {"name": public_name(aligned.label), "fingerprint": prints[0].hexdigest()},
        "unaligned": {"name": public_name(unaligned.label), "fingerprint": prints[1].hexdigest()},
        "digest": factor_digest({name: (factors[name].a, b) for name, b in after.items()}),
    }
    return new, RepairReport(modules, record)


def factor_digest(factors: Mapping[str, tuple[Tensor, Tensor]]) -> str:
    """sha256 over `(A, B)` of every module, in fp32: what a later reader compares with the record."""
    digest = hashlib.sha256()
    for name in sorted(factors):
        digest.update(name.encode())
        for tensor in factors[name]:
            digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def select(rows: list[ModuleRepair], options: RepairOptions) -> set[str]:
    """Names of the modules to repair. A module without a cosine is taken last, and never by a threshold;
    `zero_delta="zero"` always takes its own.
    """
    zeroed = {row.name for row in rows if row.delta == 0 and options.zero_delta == "zero"}
    usable = [row for row in rows if row.delta > 0 or row.name in zeroed]
    if options.select == "all":
        return {row.name for row in usable}
    cos = {row.name: math.inf if math.isnan(row.cos) else row.cos for row in usable}
    if options.select == "threshold":
        return zeroed | {name for name, value in cos.items() if value < options.threshold}
    ordered = sorted(cos, key=lambda name: cos[name])  # stable: equal cosines in the adapter's order
    count = min(options.num_modules or 0, len(ordered))
    return zeroed | set(ordered[:count])


def _module(
    name: str, factor: Factors, pair: list[Matrix], options: RepairOptions
) -> tuple[ModuleRepair, Tensor, tuple[str, float]]:
    """One module, as if it were selected; and its expected quantization noise relative to V."""
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    delta = Delta(name, pair[0], pair[1], options.dtype, device)
    b = factor.b.detach().to(device, options.dtype)
    new, inside, k = projected(delta, b, options)
    if delta.energy == 0 and options.zero_delta == "error":
        raise CheckpointError(
            f"{name}: the aligned and the unaligned weight are equal: there is no alignment direction. Check the "
            "pair, or choose zero_delta='keep' or 'zero'."
        )
    root = torch.linalg.qr(factor.a.detach().to(device, torch.float64).mT, mode="r").R.mT  # ||X A|| = ||X R^T||
    old, after, projection = (x.double() @ root for x in (b, new, inside))
    norm, length = float(old.norm()), float(projection.norm())
    cos = float((projection * old).sum()) / (norm * length) if norm * length > 0 else math.nan
    gain = float(after.norm()) / norm if norm > 0 else math.nan
    noisy = math.hypot(*(NOISE.get(matrix.quantization or "", 0.0) for matrix in pair)) * delta.base_norm
    ratio = noisy / math.sqrt(delta.energy) if delta.energy > 0 else 0.0
    share = math.sqrt(delta.energy) / delta.base_norm if delta.base_norm > 0 else math.inf if delta.energy > 0 else 0.0
    return ModuleRepair(name, cos, False, gain, factor.scaling * norm, share, k), new, (name, ratio)


def _outcome(row: ModuleRepair, selected: bool) -> ModuleRepair:
    kept = row.kept_norm * (row.gain if selected and not math.isnan(row.gain) else 1.0)
    return replace(row, selected=selected, kept_norm=kept)


def _check_pair(
    name: str, factor: Factors, pair: list[Matrix], sources: tuple[Weights, Weights], options: RepairOptions
) -> None:
    wanted = (factor.b.shape[0], factor.a.shape[1])
    for matrix, source in zip(pair, sources, strict=True):
        if matrix.shape != wanted:
            raise CheckpointError(
                f"{source.label}: the weight of {name} is {matrix.shape}, the adapter's update {wanted}. Give models "
                "of its architecture."
            )
        if matrix.quantization is not None and not options.allow_quantized_delta:
            raise CheckpointError(
                f"{source.label}: the weight of {name} is {matrix.quantization}; rounding moves it by about "
                f"{NOISE[matrix.quantization]:.0%} of its norm, "
                "as much as an alignment or more. Give a 16-bit checkpoint (aligned=...), or insist with "
                "allow_quantized_delta=True."
            )


def _check_base(name: str, aligned: Matrix, base: Matrix, label: str) -> None:
    limit = weights.DISTANCE_QUANTIZED if base.quantization or aligned.quantization else weights.DISTANCE_DENSE
    distance = weights.distance(sample(base), sample(aligned)) if base.shape == aligned.shape else math.inf
    if not distance <= limit:
        raise CheckpointError(
            f"{name}: {label} is not the model that the adapter was trained on (relative distance of the fingerprints "
            f"{distance:.3g}, limit {limit:g}). Give that model as aligned=."
        )


def _warn_of_noise(noise: list[tuple[str, float]]) -> None:
    name, ratio = max(noise, key=lambda pair: pair[1])
    if ratio > 0:
        warnings.warn(
            f"V comes from quantized weights: their rounding noise is expected at {ratio:.2g} times ||V|| in {name} "
            "(the worst).",
            stacklevel=3,
        )
