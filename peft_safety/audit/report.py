"""`orthogonality_report`: figures of every module of an adapter, each with its null."""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn
from tqdm.auto import tqdm

from peft_safety.audit.functional import KINDS, Calibration, Interference, calibration_sets, interference
from peft_safety.audit.metrics import SideOverlap, Update, compare, decompose, weight_span
from peft_safety.calibration.batches import Positions
from peft_safety.calibration.moments import exact_matmul
from peft_safety.core import base_weights as weights
from peft_safety.core.environment import environment
from peft_safety.core.features import SAME_UPDATE, check_features
from peft_safety.core.names import public_name
from peft_safety.core.projection import all_finite
from peft_safety.errors import CheckpointError, ConfigError
from peft_safety.layers.adapters import adapter_layers, config_table
from peft_safety.methods.factors import beside_factors, layer_factors

DEFAULT_K = 32
"""Directions of W for the energy overlap; the methods of this package protect as many by default."""


def layer_number(name: str) -> int | None:
    number = re.search(r"(?:^|\.)(\d+)\.", name)
    return int(number.group(1)) if number else None


@dataclass(frozen=True)
class ModuleOrthogonality:
    """One module's update against its weight, on the input side (`right`, as published) and on the output side. `rank`
    0 is a zero update, whose figures are NaN. `others`: `|cos|` with the update of every other adapter on the module.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    norm: float
    relative_norm: float
    effective_rank: float
    right: SideOverlap
    left: SideOverlap
    others: Mapping[str, float]
    general: Interference | None = None
    harmful: Interference | None = None

    @property
    def interference_ratio(self) -> float:
        """Interference on general inputs over that on harmful inputs; NaN if not measured."""
        if self.general is None or self.harmful is None or self.harmful.share == 0:
            return math.nan
        return self.general.share / self.harmful.share

    @property
    def layer(self) -> int | None:
        return layer_number(self.name)

    @property
    def kind(self) -> str:
        """The part of the name after the layer's number, or the whole name."""
        return re.split(r"(?:^|\.)\d+\.", self.name, maxsplit=1)[-1]


FIGURES: dict[str, tuple[Callable[[ModuleOrthogonality], float], str, str]] = {
    "effective_rank": (lambda row: row.effective_rank, "eff.\nrank", ".3g"),
    "relative_norm": (lambda row: row.relative_norm, "|dW|\n/|W|", ".2g"),
    "metric": (lambda row: row.right.metric, "metric", ".3f"),
    "metric_null": (lambda row: row.right.null, "null", ".3f"),
    "z": (lambda row: row.right.z, "z", ".1f"),
    "angle": (lambda row: row.right.angle, "angle", ".1f"),
    "energy": (lambda row: row.right.energy, "energy", ".2g"),
    "energy_ratio": (lambda row: row.right.energy_ratio, "energy\n/ chance", ".2f"),
    "left_z": (lambda row: row.left.z, "out:\nz", ".1f"),
    "left_energy_ratio": (lambda row: row.left.energy_ratio, "out:\n/ chance", ".2f"),
    "general": (lambda row: math.nan if row.general is None else row.general.share, "general", ".2g"),
    "harmful": (lambda row: math.nan if row.harmful is None else row.harmful.share, "harmful", ".2g"),
    "interference_ratio": (lambda row: row.interference_ratio, "ratio", ".2f"),
}
"""The figures that are summarized: how they are read, their heading and their format in a table."""


def medians(rows: Iterable[ModuleOrthogonality], others: Iterable[str] = ()) -> dict[str, float]:
    """Medians of the `FIGURES`, and of `overlap:NAME` for other adapters, over the modules that have them, or NaN."""
    rows = list(rows)
    columns = {name: [figure(row) for row in rows] for name, (figure, _, _) in FIGURES.items()}
    columns |= {f"overlap:{other}": [row.others.get(other, math.nan) for row in rows] for other in others}
    known = {name: [value for value in values if not math.isnan(value)] for name, values in columns.items()}
    return {name: statistics.median(values) if values else math.nan for name, values in known.items()}


@dataclass(frozen=True)
class OrthogonalityReport:
    """All modules of an adapter.

    Attributes:
        adapter: its name on the model.
        modules: in module order.
        others: adapters that it was compared with.
        environment: versions and machine; model, `k`, positions, and source, hash and size of the calibration data;
            `not_compared`: other adapters whose update is no plain product, each with the reason; `unconstrained`:
            what the adapter trains beside its factors, of which no figure tells.
    """

    adapter: str
    modules: tuple[ModuleOrthogonality, ...]
    others: tuple[str, ...]
    environment: Mapping[str, Any]

    @property
    def measured(self) -> bool:
        return all(row.general is not None for row in self.modules)

    @property
    def summary(self) -> dict[str, float]:
        return medians(self.modules, self.others)

    @property
    def kinds(self) -> dict[str, list[ModuleOrthogonality]]:
        """Modules by the last part of their name, or by a longer part if that is ambiguous inside a layer."""
        lasts = Counter(kind.rpartition(".")[2] for kind in {row.kind for row in self.modules})
        groups: dict[str, list[ModuleOrthogonality]] = {}
        for row in self.modules:
            last = row.kind.rpartition(".")[2]
            groups.setdefault(last if lasts[last] == 1 else row.kind, []).append(row)
        return groups

    def to_json(self) -> dict[str, Any]:
        rows = [asdict(row) | {"interference_ratio": row.interference_ratio} for row in self.modules]
        facts = {"adapter": self.adapter, "others": self.others, "environment": dict(self.environment)}
        result: dict[str, Any] = _plain(facts | {"summary": self.summary, "modules": rows})
        return result


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def orthogonality_report(
    model: nn.Module,
    adapter: str = "default",
    *,
    calibration: Calibration = None,
    tokenizer: Any = None,
    k: int = DEFAULT_K,
    positions: Positions = "response",
    progress: bool = True,
) -> OrthogonalityReport:
    """Compare an adapter's update with the weights under it, and measure what it does to general and harmful inputs.

    The published claim (patches nearly orthogonal to W) rests on a metric that random subspaces pass as well, so each
    figure stands beside its null. The model is not changed, and dW is never formed. The geometry needs no data.

    Args:
        model: a PeftModel, or a model with injected adapters; dense, Conv1D or bitsandbytes base.
        adapter: name of a LoRA adapter, plain or one of this package's.
        calibration: for the functional part. None leaves it out; `"auto"` takes the package's general prompts with the
            base model's own greedy answers, and its harmful requests with refusals; or
            `{"general": ..., "harmful": ...}`, each rows or tokenized batches with labels.
        tokenizer: for rows of text; default the model's own.
        k: directions of W behind the energy overlap, at least 1; at most what W has.
        positions: tokens that count: "response", "prompt" or "all".
        progress: show a bar.

    Returns:
        An `OrthogonalityReport`: figures of each module and of the whole.

    Raises:
        ConfigError: no such adapter, one whose update is not a plain product, a merged one; malformed arguments.
        UnsupportedLayerError, CheckpointError: embeddings, convolutions; sharded weights; a weight that is not finite.
        CalibrationError, DataError: calibration data that is empty, malformed or not finite.

    Reference: Mou et al., arXiv 2510.09004 (the metric); Roy and Vetterli, EUSIPCO 2007 (effective rank). The nulls
    and the functional part are ours.
    """
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise ConfigError(f"k={k!r}. Use an integer of at least 1.")
    if positions not in ("response", "prompt", "all"):
        raise ConfigError(f"positions={positions!r}. Use 'response', 'prompt' or 'all'.")
    layers, others, not_compared = _resolve(model, adapter)
    base = {name: layer.get_base_layer() for name, layer in layers.items()}
    updates = {name: _update(name, layer, adapter) for name, layer in layers.items()}
    described: dict[str, Any] = {}
    functional: dict[str, dict[str, Interference]] = {}
    for kind, (batches, facts) in calibration_sets(model, calibration, tokenizer, progress).items():
        options: dict[str, Any] = {"positions": positions, "progress": progress, "what": f"{kind} inputs"}
        functional[kind] = interference(model, base, updates, batches, **options)
        described[kind] = facts | {"tokens": max(row.tokens for row in functional[kind].values())}
    rows = []
    for name, layer in tqdm(layers.items(), desc="orthogonality", unit="module", disable=not progress):
        update, weight = updates[name], weights.dense_weight(base[name], name)
        shape = (int(weight.shape[0]), int(weight.shape[1]))
        if not all_finite(weight):
            raise CheckpointError(f"{name}: the base weight {shape} holds NaN or Inf. Load an intact checkpoint.")
        with exact_matmul():
            span = weight_span(weight, k)
        relative = update.norm / span.norm if span.norm > 0 else math.nan
        sizes = (update.rank, update.norm, relative, update.effective_rank)
        right = compare(update.right, update.values, span.right, k)
        left = compare(update.left, update.values, span.left, k)
        overlaps = {other: update.overlap(_update(name, layer, other)) for other in others if other in layer.lora_A}
        measured = (functional[kind][name] if functional else None for kind in KINDS)
        rows.append(ModuleOrthogonality(name, shape, *sizes, right, left, overlaps, *measured))
    source = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    facts = environment(seed=0, model=public_name(source) if source else "", k=k, calibration=described or None)
    facts |= {"positions": positions} if described else {}
    facts |= {"not_compared": not_compared} if not_compared else {}
    trained = beside_factors(model, adapter)
    facts |= {"unconstrained": trained} if trained else {}
    return OrthogonalityReport(adapter, tuple(rows), tuple(others), facts)


def _resolve(model: nn.Module, adapter: str) -> tuple[dict[str, LoraLayer], list[str], dict[str, str]]:
    """The adapter's layers, the other adapters on them, and those that cannot be compared with the reason."""
    table = config_table(model)
    if adapter not in table:
        raise ConfigError(f"the model has no adapter {adapter!r}, only {sorted(table)}. Name one of these.")
    check_features(table[adapter], f"adapter {adapter!r}", allowed=SAME_UPDATE)
    layers = adapter_layers(model, adapter, linear=True)
    if not layers:
        raise ConfigError(f"adapter {adapter!r} has no LoRA layer on this model. Name another adapter.")
    comparable, skipped = [], {}
    for other, config in table.items():
        if other != adapter and any(other in layer.lora_A for layer in layers.values()):
            try:
                check_features(config, f"adapter {other!r}", allowed=SAME_UPDATE)
                comparable.append(other)
            except ConfigError as error:
                skipped[other] = str(error)
    return layers, comparable, skipped


def _update(name: str, layer: LoraLayer, adapter: str) -> Update:
    factors = layer_factors(name, layer, adapter)
    return decompose(factors.a, factors.b, factors.scaling)
