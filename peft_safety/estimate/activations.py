"""Safety subspaces from activations: the top left singular vectors of `W X`, for all layers in one pass."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from peft_safety import weights
from peft_safety.errors import CalibrationError, ConfigError
from peft_safety.estimate.moments import collect, to_batches
from peft_safety.estimate.targets import target_layers
from peft_safety.projection import top_left_singular
from peft_safety.subspace import SafetySubspace

METHODS = ("salora",)
RANK_FLOOR = 1e-3
"""Singular values below this share of the largest are rounding noise of the fp32 moments: a moment of exact rank r leaves up to 9e-4, about the square root of
fp32's epsilon, in the next one. SmolLM2-135M's smallest of 32 is at 6e-3."""


def estimate(
    model: nn.Module,
    data: Sequence[Mapping[str, Any]],
    *,
    tokenizer: Any = None,
    method: str = "salora",
    rank: float = 32,
    target_modules: Iterable[str] | str | None = None,
    layers: Mapping[str, nn.Module] | None = None,
    batch_size: int = 8,
    max_length: int = 512,
    seed: int = 0,
    allow_fewer: bool = False,
    progress: bool = True,
) -> SafetySubspace:
    """Estimate the output directions that carry the responses of `data`.

    For each target layer: `U` = top `rank` left singular vectors of `W X`, where the columns of `X` are the layer's inputs at the labelled (response) tokens;
    bias excluded, not centred. Any adapter on the model is switched off meanwhile.

    Args:
        model: causal language model; may be quantised, may carry adapters.
        data: rows `{prompt, response}` / `{messages}` / `{text, label}`, or tokenised batches with `labels` (-100: does not count).
        tokenizer: with a chat template; for rows only.
        rank: directions per layer, an integer in `1 <= rank < out_features`; or a share of `out_features`, a float in (0, 1), at most `in_features` directions.
        target_modules: as in `LoraConfig`; None takes PEFT's default of the architecture.
        layers: base layers by name, instead of `target_modules`.
        allow_fewer: where the responses span fewer than `rank` directions (a first layer sees little but the embeddings of the tokens that occur), keep those,
            with a warning, instead of raising.

    Returns:
        A subspace with the singular values of `W X`, fingerprints and provenance.

    Raises:
        CalibrationError: fewer labelled tokens, or fewer independent directions, than `rank`; inputs that are not finite.
        ConfigError: an unknown method, `rank >= out_features`, no module matched.

    Reference: SaLoRA, arXiv 2501.01765, section 4.1. Its public code runs the model once per layer; this is one pass and the same subspace.
    """
    if method not in METHODS:
        raise ConfigError(f"method={method!r}; no such method. Use one of {', '.join(METHODS)}.")
    layers = dict(target_layers(model, target_modules) if layers is None else layers)
    ranks = {name: _rank_of(rank, name, layer) for name, layer in layers.items()}
    batches, digest = to_batches(data, tokenizer, batch_size=batch_size, max_length=max_length)
    with adapters_off(model):
        moments = collect(model, layers, batches, progress=progress)
    if moments.tokens < max(ranks.values()):
        raise CalibrationError(f"{moments.tokens} labelled tokens cannot span rank={max(ranks.values())} directions. Give more data, or a smaller rank.")
    found = {name: _directions(name, layer, moments.moment(name), ranks[name], seed) for name, layer in layers.items()}
    _check_spans({name: u.shape[1] for name, (u, _) in found.items()}, ranks, allow_fewer)
    samples = sum(int(batch["input_ids"].shape[0]) for batch in batches)
    provenance = {"method": method, "rank": rank, "seed": seed, "data": digest, "samples": samples, "tokens": moments.tokens, "model": _name(model)}
    subspace = SafetySubspace({n: {"out": u} for n, (u, _) in found.items()}, {n: {"out": s} for n, (_, s) in found.items()}, provenance=provenance)
    subspace.bind(layers)
    return subspace


def _directions(name: str, layer: nn.Module, moment: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """`(U (m, k), s (k,))` of one layer, `k = rank` or, where the outputs span less, that."""
    weight = weights.dense_weight(layer, name).to(moment.device)
    if not bool(torch.isfinite(weight).all()):
        raise CalibrationError(f"{name}: the weight {tuple(weight.shape)} holds NaN or Inf. Load an intact checkpoint.")
    u, s = top_left_singular(weight, moment, rank, seed=seed)
    span = int((s > RANK_FLOOR * s[0]).sum())
    return u[:, :span], s[:span]


def _check_spans(spans: Mapping[str, int], ranks: Mapping[str, int], allow_fewer: bool) -> None:
    short = {name: span for name, span in spans.items() if span < ranks[name]}
    if not short:
        return
    name = min(short, key=lambda n: short[n])
    said = f"{name}: the responses span {short[name]} directions only, rank={ranks[name]} were asked for ({len(short)} of {len(spans)} layers fall short)."
    if not allow_fewer or short[name] == 0:
        raise CalibrationError(f"{said} Give more varied data, a smaller rank, or allow_fewer=True.")
    warnings.warn(f"{said} Each protects all that it has.", stacklevel=3)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Run the bare base model; adapters and what they train come back unchanged.

    Raises:
        ConfigError: an adapter is merged into the base weights.
    """
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


def _rank_of(rank: float, name: str, layer: nn.Module) -> int:
    """Directions to take of one layer."""
    m, n = weights.shape(layer)
    if isinstance(rank, float) and 0 < rank < 1:
        return min(max(1, round(rank * m)), m - 1, n)
    if not isinstance(rank, int) or isinstance(rank, bool):
        raise ConfigError(f"rank={rank!r}. Use an integer of at least 1, or a share of the output features between 0 and 1.")
    if not 1 <= rank < m:
        raise ConfigError(
            f"{name}: rank={rank} of {m} output features leaves nothing to train (the layer is {m} x {n}). Use a rank from 1 to {m - 1}, or leave it out."
        )
    if rank > n:
        raise ConfigError(f"{name}: rank={rank}, but {n} input features give at most {n} directions. Use a smaller rank, or leave it out.")
    return rank


def _name(model: nn.Module) -> str:
    config = getattr(model, "config", None)
    path = str(getattr(config, "_name_or_path", "") or "")
    return path.rstrip("/").rpartition("/")[2]  # a local path is nobody else's business


def tokenizer_of(model: nn.Module) -> Any:
    """The tokenizer under the model's own name or directory.

    Raises:
        ConfigError: there is none.
    """
    from transformers import AutoTokenizer

    source = getattr(getattr(model, "config", None), "_name_or_path", "") or ""
    try:
        if not source:
            raise OSError("the model has no name")
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no tokenizer can be loaded for {source or 'the model'!r} ({type(error).__name__}). "
            "Calibrate with SafetySubspace.from_activations(model, data, tokenizer=...) and pass subspace=."
        ) from error


def package_calibration(model: nn.Module, *, rank: int, layers: Mapping[str, nn.Module], pairs: int, progress: bool = True) -> SafetySubspace:
    """What `subspace="auto"` does: estimate on the package's own harmful requests and refusals."""
    from peft_safety.data import refusal_pairs

    subspace = estimate(model, refusal_pairs("calibration", pairs), tokenizer=tokenizer_of(model), rank=rank, layers=layers, progress=progress)
    subspace.provenance["source"] = "peft_safety refusal pairs, calibration split"
    return subspace
