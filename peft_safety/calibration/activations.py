"""Safety subspaces from activations: the span of each layer's inputs or outputs on some data, in one pass."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from peft_safety.calibration.bases import contrastive_basis, input_basis, output_basis_in_groups
from peft_safety.calibration.batches import Batch, data_of, is_text, unit_of
from peft_safety.calibration.budget import bytes_of, groups
from peft_safety.calibration.leaving_out import record
from peft_safety.calibration.models import adapters_off, model_name
from peft_safety.calibration.moments import InputMoments, Moment, collect, inputs_of
from peft_safety.calibration.prepare import Job, input_needs, prepare
from peft_safety.calibration.sizes import Size
from peft_safety.calibration.token_bases import embedding_outputs, seen_tokens
from peft_safety.calibration.token_counts import TokenCounts
from peft_safety.calibration.token_rows import TokenRows
from peft_safety.core import base_weights as weights
from peft_safety.core import kinds
from peft_safety.core.names import listed
from peft_safety.core.parameters import observed
from peft_safety.core.projection import Side
from peft_safety.core.subspace import DEFAULT_DTYPE, SafetySubspace
from peft_safety.data.rows import Rows
from peft_safety.errors import CalibrationError, UnsupportedLayerError


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
    layers, where, batches = job.layers, job.positions, job.sources[0][0]
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
    provenance = {"seed": seed, "model": model_name(model), **counts, **_facts(job, reached)}
    if len(job.sources) == 1 and "in" in job.sides:
        provenance["covered"] = covered
    subspace = SafetySubspace(bases, spectra, provenance=provenance).rounded(dtype)
    subspace.bind(reached)
    return subspace


def _facts(job: Job, reached: Mapping[str, nn.Module]) -> dict[str, Any]:
    """What was asked for, on which data, and which layers have no basis."""
    (batches, digest), *against = job.sources
    return {
        "method": job.method,
        "sides": "+".join(job.sides),
        "positions": job.positions,
        "data": digest,
        "samples": sum(len(data_of(batch)) for batch in batches),
        **job.size_facts,
        **({"observed": names} if (names := observed(reached)) else {}),
        **({"against": against[0][1]} if against else {}),
        **record([name for name in job.layers if name not in reached], job.narrow),
    }


def _counts(moments: InputMoments, batches: Sequence[Batch]) -> dict[str, int]:
    """How many positions counted, by what they are: tokens, patches, frames."""
    result = {"tokens": moments.tokens} if moments.tokens or not moments.others else {}
    if moments.others:
        units = {unit_of(batch) for batch in batches if not is_text(batch)}
        result[units.pop() if len(units) == 1 else "vectors"] = moments.others
    return result


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
    warnings.warn(f"{problem} Each takes all that there are.", stacklevel=3)
