"""What a calibration will do, checked before any model runs."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from peft_safety.calibration.batches import Batch, Positions, attended, lacks_responses, to_batches
from peft_safety.calibration.budget import Need, need
from peft_safety.calibration.sizes import DEFAULT_RANK, GUARDSPACE_SIZE, Size, plan
from peft_safety.core import base_weights as weights
from peft_safety.core.projection import OVERSAMPLING, Side
from peft_safety.core.targets import target_layers
from peft_safety.data.rows import Rows
from peft_safety.errors import ConfigError

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
