"""How many directions each basis has, and which layers are too narrow for one."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from peft_safety.core import base_weights as weights
from peft_safety.core.kinds import groups, is_embedding
from peft_safety.core.names import kind_of, listed
from peft_safety.core.projection import Side
from peft_safety.errors import ConfigError

DEFAULT_RANK = 32
"""Directions by default. As published for SaLoRA (arXiv 2501.01765, section 5.1)."""
GUARDSPACE_SIZE: tuple[float | None, float | None] = (0.25, None)
"""GuardSpace's default: the rank, here a share of the input dimensions, and the energy, of which the rank is then the
cap. In a probe on SmolLM2-135M (one seed) a quarter kept refusals at every share of poison; a long fine-tune needed
half. To be confirmed by benchmarks/guardspace.py."""
NARROW_SHARE = 4
"""A layer is narrow if it is this many times narrower than the median target layer (a head, a gate). Only narrow
layers get a smaller basis than requested; for ordinary layers, a rank that is too large is an error."""


@dataclass(frozen=True)
class Size:
    """How many directions of a layer: `rank`; or a `share` of its features; or as many as hold `energy`, a share of
    the moment, capped by one of these or not at all. Never more than `most` (narrow layers).
    """

    rank: int | None = None
    share: float | None = None
    energy: float | None = None
    most: int | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None and name != "most"}
        if not given or {"rank", "share"} <= given.keys():
            raise ConfigError(f"give one of rank, a share and energy for the size of a basis, not {given or 'none'}.")
        if not (self.rank is None or _is_integer(self.rank)) or not (self.share is None or 0 < self.share < 1):
            value = self.share if self.rank is None else self.rank
            raise ConfigError(f"rank={value!r}. Use an integer of at least 1, or a share of the features in (0, 1).")
        if not (self.energy is None or _is_energy(self.energy)):
            raise ConfigError(f"energy={self.energy!r}. Use a number in (0, 1].")

    @classmethod
    def of(cls, rank: float | None, energy: float | None = None) -> Size:
        """An integer `rank` is a number of directions, a float a share of the features; beside an energy, the cap."""
        return cls(share=rank, energy=energy) if isinstance(rank, float) else cls(rank=rank, energy=energy)

    def fixed(self, shape: tuple[int, int], side: Side, name: str) -> int | None:
        """Directions on one side of a layer `(m, n)`, whose inputs span at most `n`; None where the energy decides."""
        d, n = shape[0 if side == "out" else 1], shape[1]
        if self.energy is not None:
            return None
        if self.share is not None:
            return self.limit(shape, side)
        rank = self.rank if self.rank is None or self.most is None else min(self.rank, self.most)
        if rank is not None and not 1 <= rank < d:
            raise ConfigError(
                f"{name}: rank={rank} of {d} {side}put features leaves nothing to train, or protects nothing (the "
                f"layer is {shape[0]} x {n}). Use a safety_rank (rank) from 1 to {d - 1}, or a share."
            )
        if rank is not None and rank > n:
            raise ConfigError(f"{name}: rank={rank}, but the inputs span at most {n} directions. Use a smaller one.")
        return rank

    def limit(self, shape: tuple[int, int], side: Side) -> int:
        """Directions that one side of a layer `(m, n)` has at most: the cap of an energy, if it has one."""
        d, n = shape[0 if side == "out" else 1], shape[1]
        if self.share is not None:
            return min(max(1, round(self.share * d)), d - 1, n)
        return min(n, d if self.rank is None else min(self.rank, d - 1))


def plan(
    layers: Mapping[str, nn.Module],
    rank: float | None,
    energy: float | None,
    per_kind: Mapping[str, float] | None,
    sides: Sequence[Side],
    weights_only: bool = False,
) -> tuple[dict[str, dict[Side, Size]], list[str]]:
    """The size of each basis by layer and side, and the layers that get none, with a single feature on a side. Narrow
    layers that cannot hold a rank take what they can. `weights_only`: the bases are those of the weight.
    """
    usual = Size.of(rank, energy)
    special = {kind: Size.of(x) if energy is None else Size.of(rank, x) for kind, x in (per_kind or {}).items()}
    kinds = {kind_of(name) for name in layers}
    if unknown := sorted(set(special) - kinds):
        some = ", ".join(sorted(kinds))
        raise ConfigError(f"safety_rank_pattern: no target module is of that kind: {unknown[0]!r}. There are {some}.")
    shapes = {name: weights.shape(layer) for name, layer in layers.items()}
    tokens = [name for name, layer in layers.items() if is_embedding(layer) and not weights_only]
    features = {
        (name, side): shape[0] // groups(layers[name]) if side == "out" else shape[1]
        for name, shape in shapes.items()
        for side in sides
    }
    unfit = [name for name in layers if any(features[name, side] < 2 for side in sides)]
    if len(unfit) == len(layers):
        raise ConfigError(f"{listed(unfit)}: a single feature leaves no direction free. Use other target_modules.")
    sizes: dict[str, dict[Side, Size]] = {name: {} for name in layers if name not in unfit}
    reduced = {}
    for side in sides:
        sized = [name for name in sizes if side == "out" or name not in tokens]
        sizes |= {name: {**sizes[name], side: ALL_TOKENS} for name in sizes if name not in sized}
        widths = {name: shapes[name][1] if side == "in" and not weights_only else min(shapes[name]) for name in sized}
        if not widths:
            continue
        median = statistics.median_low(widths.values())
        for name, width in widths.items():
            size = special.get(kind_of(name), usual)
            if width * NARROW_SHARE <= median:
                most = min(features[name, side] - 1, width)
                size = replace(size, most=most)
                if size.energy is None and size.rank is not None and size.rank > most:
                    reduced[name] = most
            size.fixed(shapes[name], side, name)
            sizes[name][side] = size
    if reduced:
        warnings.warn(
            f"{len(reduced)} of {len(sizes)} layers are too narrow for the requested rank, and protect fewer "
            f"directions (at least {min(reduced.values())}): {listed(reduced)}.",
            stacklevel=4,
        )
    return sizes, unfit


def check_size_options(
    safety_rank: Any, safety_energy: Any, safety_rank_pattern: Any, where: str, *, least: int = 1
) -> None:
    """A ConfigError refuses size options of a config, recipe or command; `least`: smallest rank without an energy."""
    pattern = {} if safety_rank_pattern is None else safety_rank_pattern
    if not isinstance(pattern, Mapping) or not all(isinstance(kind, str) for kind in pattern):
        raise ConfigError(
            f"{where}: safety_rank_pattern={pattern!r}. Map the ends of module names to numbers: {{'down_proj': 0.1}}."
        )
    special = [(f"safety_rank_pattern[{kind!r}]", value, 1) for kind, value in pattern.items()]
    least = least if safety_energy is None else 1
    ranks = [] if safety_rank is None else [("safety_rank", safety_rank, least)]
    energies = [] if safety_energy is None else [("safety_energy", safety_energy, 1), *special]
    for name, value, lowest in ranks if energies else [*ranks, *special]:
        share = isinstance(value, float) and 0 < value < 1
        if not share and not (_is_integer(value) and value >= lowest):
            raise ConfigError(
                f"{where}: {name}={value!r}. Use a number of directions, an integer of at least {lowest}; or a share "
                "of the features, a float between 0 and 1."
            )
    for name, value, _ in energies:
        if not _is_energy(value):
            raise ConfigError(f"{where}: {name}={value!r}. Use a share of the energy: above 0, at most 1.")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_energy(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1


ALL_TOKENS = Size(energy=1.0)
"""Of an embedding's inputs: each token that the data hold, whatever size is requested; see `token_bases`."""
