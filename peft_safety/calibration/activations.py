"""Safety subspaces from activations: the span of each layer's inputs or outputs on some data, in one pass."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from peft_safety.calibration.bases import contrastive_basis, input_basis, output_basis_in_groups
from peft_safety.calibration.batches import (
    Batch,
    Positions,
    attended,
    data_of,
    is_text,
    is_tokenized,
    lacks_responses,
    to_batches,
    unit_of,
)
from peft_safety.calibration.budget import Need, bytes_of, groups, need
from peft_safety.calibration.leaving_out import record
from peft_safety.calibration.moments import InputMoments, Moment, collect, inputs_of
from peft_safety.calibration.sizes import DEFAULT_RANK, GUARDSPACE_SIZE, Size, plan
from peft_safety.calibration.token_bases import embedding_outputs, seen_tokens
from peft_safety.calibration.token_counts import TokenCounts
from peft_safety.calibration.token_rows import TokenRows
from peft_safety.core import base_weights as weights
from peft_safety.core import kinds
from peft_safety.core.names import listed
from peft_safety.core.parameters import observed
from peft_safety.core.projection import OVERSAMPLING, Side
from peft_safety.core.subspace import DEFAULT_DTYPE, SafetySubspace
from peft_safety.core.targets import target_layers
from peft_safety.data.rows import Rows
from peft_safety.errors import CalibrationError, ConfigError, UnsupportedLayerError

METHODS: dict[str, tuple[tuple[Side, ...], Positions]] = {
    "salora": (("out",), "response"),
    "ortho_patch": (("in",), "all"),
    "guardspace": (("in",), "all"),
}
"""Default sides and token positions of each method."""
MAX_LENGTH = 512
"""Tokens of each row that are read, by default."""


@dataclass(frozen=True)
class Job:
    """A calibration that has been checked and not run yet. `narrow` layers have no room for a basis; `wanted` is None
    where the energy decides; `sources` are batches and their hash, of the data and of those to compare with.
    """

    method: str
    sides: tuple[Side, ...]
    positions: Positions
    layers: dict[str, nn.Module]
    narrow: list[str]
    sizes: Mapping[str, Mapping[Side, Size]]
    wanted: dict[tuple[str, Side], int | None]
    sources: list[tuple[list[Batch], str]]
    size_facts: dict[str, Any]


def prepare(
    model: nn.Module,
    data: Rows,
    *,
    tokenizer: Any = None,
    method: str = "salora",
    rank: float | None = None,
    energy: float | None = None,
    per_kind: Mapping[str, float] | None = None,
    sides: Sequence[Side] | None = None,
    positions: Positions | None = None,
    against: Rows | None = None,
    target_modules: Iterable[str] | str | None = None,
    exclude_modules: Iterable[str] | str | None = None,
    layers: Mapping[str, nn.Module] | None = None,
    batch_size: int = 8,
    max_length: int = MAX_LENGTH,
) -> Job:
    """Check what is to be calibrated, and tokenize the data. No model runs.

    Args:
        data: rows `{prompt, response}`, `{messages}`, `{text, label}` or `{prompt}`, see
            `peft_safety.data.rows.as_rows`; or batches as the model's forward takes them: tokens with `labels` (-100:
            no response), pixels, sounds, any of its keywords.
        tokenizer: with a chat template; for rows only.
        method: "salora" (out, response tokens), "ortho_patch" or "guardspace" (in, all tokens); sets `sides` and
            `positions` where they are not given.
        rank: directions per layer, an integer (default 32); or a share of the features of that side, a float in (0, 1)
            (default of "guardspace": 0.25).
        energy: as many directions as hold this share of `||W X||^2` or `||X||^2`, in (0, 1]; at most `rank` if given.
        per_kind: other values of `rank`, or of `energy`, for modules whose name ends so: `{"down_proj": 0.1}`.
        positions: "response", "prompt" or "all" tokens; of images and sounds all patches and frames. A default of
            "response" is "all", with a warning, for data with classes, or for a model that writes no text.
        against: data that must stay in reach; the basis is then contrastive (see `contrastive_basis`).
        target_modules, exclude_modules: as in `LoraConfig`; or `layers`: base layers by name.

    Raises:
        ConfigError: an unknown method, a rank that leaves nothing to train, no module matched.
        CalibrationError: no data, or rows without a tokenizer.
    """
    if method not in METHODS:
        raise ConfigError(f"method={method!r}; no such method. Use one of {', '.join(METHODS)}.")
    if positions not in (None, "response", "prompt", "all"):
        raise ConfigError(f"positions={positions!r}. Use 'response', 'prompt' or 'all'.")
    chosen = METHODS[method][0] if sides is None else tuple(sides)
    where = positions or METHODS[method][1]
    if rank is None and energy is None:
        rank, energy = GUARDSPACE_SIZE if method == "guardspace" else (DEFAULT_RANK, None)
    if layers is None:
        layers = target_layers(model, target_modules, exclude_modules, packed="out" not in chosen)
    targets = dict(layers)
    sizes, unfit = plan(targets, rank, energy, per_kind, chosen)
    layers = {name: targets[name] for name in sizes}
    wanted = {(n, side): sizes[n][side].fixed(weights.shape(x), side, n) for n, x in layers.items() for side in chosen}
    sources = [
        to_batches(rows, tokenizer, batch_size=batch_size, max_length=max_length, model=model)
        for rows in ([data] if against is None else [data, against])
    ]
    if positions is None and where == "response" and all(lacks_responses(model, rows) for rows, _ in sources):
        where = "all"
        warnings.warn(
            f"method={method!r} counts the tokens of responses, which these data do not have: all positions count.",
            stacklevel=4,
        )
    facts = size_facts(rank, energy, per_kind)
    return Job(method, chosen, where, layers, unfit, sizes, wanted, sources, facts)


def estimate(
    model: nn.Module,
    data: Rows,
    *,
    seed: int = 0,
    memory: str | int | None = None,
    dtype: str = DEFAULT_DTYPE,
    allow_fewer: bool = False,
    progress: bool = True,
    **options: Any,
) -> SafetySubspace:
    """Estimate the directions that `data` spans in each target layer.

    With `X` the layer's inputs at the tokens that count: on the output side the top left singular vectors of `W X`
    (bias excluded, not centered); on the input side the top eigenvectors of `X X^T`, which layers with the same input
    share. Adapters on the model are switched off during the pass.

    Args:
        model: language model; may be quantized, may carry adapters. Of an encoder-decoder the encoder's tokens are the
            prompt, the decoder's the response.
        data, options: as in `prepare`.
        memory: for the second moments and their decomposition, beside the model: bytes, or a text such as "4GB"; by
            default half of what is free on the model's device. Layers that do not fit together take further passes.
        dtype: of the result, see `SafetySubspace.rounded`.
        allow_fewer: where the data span fewer than `rank` directions, protect those with a warning instead of raising.

    Returns: a subspace with spectra, fingerprints and provenance. Layers that no token reaches, or with a single
    feature on a side, have no basis (see `SafetySubspace.left_out`); narrow ones (heads, gates) may get fewer
    directions, with a warning.

    Raises:
        CalibrationError: fewer tokens, or fewer independent directions, than `rank`; inputs that are zero or not
            finite; a layer that the budget cannot hold.
        ConfigError: see `prepare`.

    Reference: SaLoRA, arXiv 2501.01765, section 4.1; GuardSpace, arXiv 2510.14301. SaLoRA's public code runs the model
    once per layer; this is one pass.
    """
    job = prepare(model, data, **options)
    layers, where, (batches, digest) = job.layers, job.positions, job.sources[0]
    bases: dict[str, dict[Side, Tensor]] = {}
    spectra: dict[str, dict[Side, Tensor]] = {}
    covered: dict[str, float] = {}
    counts: dict[str, int] = {}
    with adapters_off(model):
        leaders = inputs_of(model, layers, batches, where)
        needs = input_needs(job, leaders)
        parts = groups(layers, leaders, needs, bytes_of(memory, next(model.parameters()).device))
        as_rows = [name for name, one in needs.items() if one.as_rows]
        for number, part in enumerate(parts, 1):
            what = "calibrating" if len(parts) == 1 else f"calibrating, layers {number}/{len(parts)}"
            reading: dict[str, Any] = {"positions": where, "as_rows": as_rows, "progress": progress, "what": what}
            moments, *others = (collect(model, part, rows, **reading) for rows, _ in job.sources)
            contrast, counts = next(iter(others), None), _counts(moments, batches)
            if sum(counts.values()) < (needed := max((k for k in job.wanted.values() if k is not None), default=1)):
                given = " and ".join(f"{n} {'labeled ' * (where == 'response')}{unit}" for unit, n in counts.items())
                what = f"{given} cannot span rank={needed} directions"
                raise CalibrationError(f"{what}. Give more data, or a smaller rank.")
            seen = {name: layer for name, layer in part.items() if all(m.reaches(name) for m in (moments, *others))}
            for name, side, basis, spectrum in _bases(seen, moments, contrast, job.sizes, seed):
                bases.setdefault(name, {})[side] = basis
                spectra.setdefault(name, {})[side] = spectrum
                if side == "in" and contrast is None:
                    share = spectrum.double().square().sum() / moments.operator(name).diagonal().double().sum()
                    covered[name] = min(1.0, round(float(share), 8))
    reached = {name: layer for name, layer in layers.items() if name in bases}
    if not reached:
        raise CalibrationError(
            f"no token that counts reaches any of the {len(layers)} target layers ({listed(layers)}). Give other data."
        )
    _check_spans({(n, side): bases[n][side].shape[-1] for n in reached for side in job.sides}, job.wanted, allow_fewer)
    provenance = {
        "method": job.method,
        "sides": "+".join(job.sides),
        "positions": where,
        "seed": seed,
        "model": model_name(model),
        "data": digest,
        "samples": sum(len(data_of(batch)) for batch in batches),
        **counts,
        **job.size_facts,
        **({"observed": names} if (names := observed(reached)) else {}),
        **record([name for name in layers if name not in reached], job.narrow),
    }
    if len(job.sources) > 1:
        provenance["against"] = job.sources[1][1]
    elif "in" in job.sides:
        provenance["covered"] = covered
    subspace = SafetySubspace(bases, spectra, provenance=provenance).rounded(dtype)
    subspace.bind(reached)
    return subspace


def _counts(moments: InputMoments, batches: Sequence[Batch]) -> dict[str, int]:
    """How many positions counted, by what they are: tokens, patches, frames."""
    result = {"tokens": moments.tokens} if moments.tokens or not moments.others else {}
    if moments.others:
        units = {unit_of(batch) for batch in batches if not is_text(batch)}
        result[units.pop() if len(units) == 1 else "vectors"] = moments.others
    return result


def input_needs(job: Job, leaders: Mapping[str, str]) -> dict[str, Need]:
    """The memory that each distinct input takes, by its leader. Only top eigenvectors can be had from rows."""
    rows = job.sides == ("in",) and len(job.sources) == 1
    tokens = attended(job.sources[0][0]) if rows else None
    width: dict[str, int] = {}
    for name, layer in job.layers.items():
        leader = leaders.get(name, name)
        k = max(job.wanted[name, s] or job.sizes[name][s].limit(weights.shape(layer), s) for s in job.sides)
        width[leader] = max(width.get(leader, 0), k + OVERSAMPLING)
    return {name: need(job.layers[name], tokens, size) for name, size in width.items()}


def size_facts(rank: float | None, energy: float | None, per_kind: Mapping[str, float] | None) -> dict[str, Any]:
    """The requested size, for the provenance."""
    size = {name: value for name, value in (("rank", rank), ("energy", energy)) if value is not None}
    return size | ({"per_kind": dict(per_kind)} if per_kind else {})


def _bases(
    layers: Mapping[str, nn.Module],
    moments: InputMoments,
    contrast: InputMoments | None,
    sizes: Mapping[str, Mapping[Side, Size]],
    seed: int,
) -> Iterator[tuple[str, Side, Tensor, Tensor]]:
    """Name, side, basis and spectrum. Layers with one moment and of one size share their input basis."""
    made: dict[tuple[int | str, Size], tuple[Tensor, Tensor]] = {}
    for name, layer in layers.items():
        moment, against = moments.operator(name), None if contrast is None else contrast.operator(name)
        for side, size in sizes[name].items():
            key = (id(moment) if side == "in" else name, size)
            if key not in made:
                basis, spectrum = _basis(layer, name, side, moment, against, size, seed)
                made[key] = basis[..., : size.most], spectrum[: size.most]
            yield name, side, *made[key]


def _basis(
    layer: nn.Module, name: str, side: Side, moment: Moment, against: Moment | None, size: Size, seed: int
) -> tuple[Tensor, Tensor]:
    if isinstance(moment, TokenCounts):
        other = against if isinstance(against, TokenCounts) else None
        if side == "in":
            return seen_tokens(moment, other, name)
        return embedding_outputs(weights.dense_weight(layer, name).to(moment.device), moment, other, size, name, seed)
    if side == "in" and against is None:
        return input_basis(moment, size, name, seed=seed)
    moment = moment.dense() if isinstance(moment, TokenRows) else moment
    against = against.dense() if isinstance(against, TokenRows) else against
    if side == "in" and isinstance(against, Tensor):
        return contrastive_basis(moment, against, size, name)
    weight, blocks = weights.dense_weight(layer, name).to(moment.device), kinds.groups(layer)
    if not isinstance(against, Tensor):
        return output_basis_in_groups(weight, moment, size, blocks, name, seed=seed)
    if blocks > 1:
        raise UnsupportedLayerError(
            f"{name}: a contrastive basis of outputs mixes the {blocks} groups of this convolution, which its lora_B "
            "cannot. Leave it out of target_modules, or use side='in'."
        )
    weight = weight.to(moment.dtype)
    return contrastive_basis(weight @ moment @ weight.mT, weight @ against @ weight.mT, size, name)


def _check_spans(
    spans: Mapping[tuple[str, Side], int], wanted: Mapping[tuple[str, Side], int | None], allow_fewer: bool
) -> None:
    short = {key: span for key, span in spans.items() if span < (wanted[key] or 0)}
    if not short:
        return
    key = min(short, key=lambda k: short[k])
    problem = (
        f"{key[0]}: the data span {short[key]} directions only, rank={wanted[key]} were asked for "
        f"({len(short)} of {len(spans)} layers fall short)."
    )
    if not allow_fewer or short[key] == 0:
        raise CalibrationError(f"{problem} Give more varied data, a smaller rank, or allow_fewer=True.")
    warnings.warn(f"{problem} Each protects all that it has.", stacklevel=3)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Run the base model without its adapters, which come back unchanged. A ConfigError refuses a merged adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    tuners = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if any(module.merged for module in tuners):
        raise ConfigError("an adapter is merged into the base weights. Call unmerge_adapter() before calibrating.")
    trainable = [(p, p.requires_grad) for module in tuners for p in module.parameters()]
    was_off = [module.disable_adapters for module in tuners]
    for module in tuners:
        module.enable_adapters(False)
    try:
        yield
    finally:
        for module, off in zip(tuners, was_off, strict=True):
            module.enable_adapters(not off)
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)


def model_name(model: nn.Module) -> str:
    """Last part of the model's name or path, so that no local path is published."""
    path = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    return path.rstrip("/").rpartition("/")[2]


def tokenizer_for(model: nn.Module, rows: Sequence[Mapping[str, Any]]) -> Any:
    """The tokenizer that these rows need: the model's own, or None for tokenized batches."""
    return None if is_tokenized(rows) else tokenizer_of(model)


def tokenizer_of(model: nn.Module) -> Any:
    """The tokenizer under the model's own name or directory. A ConfigError says that there is none."""
    from transformers import AutoTokenizer

    source = getattr(getattr(model, "config", None), "_name_or_path", "") or ""
    try:
        if not source:
            raise OSError("the model has no name")
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no tokenizer can be loaded for {source or 'the model'!r} ({type(error).__name__}). Calibrate with "
            "peft_safety.calibrate(model, config, tokenizer=...) and set config.subspace."
        ) from error
