"""Figures with their uncertainty: a rate with a Wilson interval, a mean with its standard error."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from peft_safety.errors import DataError

Z_95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""


def wilson_interval(k: int, n: int) -> tuple[float, float]:
    """95 % interval of a proportion, k of n: 0 <= low <= k/n <= high <= 1 (E. B. Wilson, JASA 22, 1927)."""
    if n < 1 or not 0 <= k <= n:
        raise DataError(f"{k} of {n} is no proportion. Evaluate on at least one item.")
    p, square = k / n, Z_95 * Z_95
    center = p + square / (2 * n)
    half = Z_95 * math.sqrt(p * (1 - p) / n + square / (4 * n * n))
    scale = 1 + square / n
    return max(0.0, min(p, (center - half) / scale)), min(1.0, max(p, (center + half) / scale))


@dataclass(frozen=True)
class Rate:
    """`k` of `n` items, with a 95 % Wilson interval."""

    k: int
    n: int

    def __post_init__(self) -> None:
        wilson_interval(self.k, self.n)

    @classmethod
    def of(cls, outcomes: Iterable[bool]) -> Rate:
        listed = list(outcomes)
        return cls(sum(listed), len(listed))

    @property
    def value(self) -> float:
        return self.k / self.n

    @property
    def interval(self) -> tuple[float, float]:
        return wilson_interval(self.k, self.n)

    def to_json(self) -> dict[str, Any]:
        """Plain numbers: value, low, high, k, n."""
        low, high = self.interval
        return {"value": self.value, "low": low, "high": high, "k": self.k, "n": self.n}

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.value:.0f} % [{100 * low:.0f}, {100 * high:.0f}]"


@dataclass(frozen=True)
class Mean:
    """A mean over `n` items, with a 95 % interval from its standard error (infinitely wide for n = 1)."""

    value: float
    stderr: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        n = len(values)
        if n < 1 or not all(map(math.isfinite, values)):
            raise DataError(f"the mean of {n} values is undefined. Give at least one value, all finite.")
        mean = math.fsum(values) / n
        variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1) if n > 1 else math.inf
        return cls(mean, math.sqrt(variance / n), n)

    @property
    def interval(self) -> tuple[float, float]:
        return self.value - Z_95 * self.stderr, self.value + Z_95 * self.stderr

    def to_json(self) -> dict[str, Any]:
        """Plain numbers: value, low, high, n; the bounds are None where n = 1 leaves them unknown."""
        low, high = (bound if math.isfinite(bound) else None for bound in self.interval)
        return {"value": self.value, "low": low, "high": high, "n": self.n}

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.2f} [{low:.2f}, {high:.2f}]"


@dataclass(frozen=True)
class Paired:
    """Two arms on the same `n` items: how many only the one, only the other succeeds on."""

    only_first: int
    only_second: int
    n: int

    def __post_init__(self) -> None:
        if min(self.only_first, self.only_second) < 0:
            raise DataError(f"{self.only_first} and {self.only_second} discordant items: counts are not negative.")

    @classmethod
    def of(cls, first: Sequence[bool], second: Sequence[bool]) -> Paired:
        """Compare outcomes item by item."""
        if len(first) != len(second) or not first:
            raise DataError(f"{len(first)} and {len(second)} outcomes are no pairs. Measure both arms on equal items.")
        pairs = [(bool(a), bool(b)) for a, b in zip(first, second, strict=True)]
        return cls(pairs.count((True, False)), pairs.count((False, True)), len(pairs))

    @property
    def p_value(self) -> float:
        """Exact two-sided p-value: how likely a split of the discordant items as uneven as this one is by chance.

        Reference: Q. McNemar, Psychometrika 12 (1947); the exact form is the sign test.
        """
        discordant = self.only_first + self.only_second
        tail = sum(math.comb(discordant, k) for k in range(min(self.only_first, self.only_second) + 1))
        return min(1.0, 2 * tail / 2**discordant)

    @property
    def difference(self) -> float:
        """Rate of the first arm less that of the second."""
        return (self.only_first - self.only_second) / self.n


Figure = Rate | Mean


def figure_from_json(data: dict[str, Any]) -> Figure:
    try:
        if "k" in data:
            return Rate(int(data["k"]), int(data["n"]))
        value, n = float(data["value"]), int(data["n"])
        return Mean(value, math.inf if data["high"] is None else (float(data["high"]) - value) / Z_95, n)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{data!r} is neither a rate (k, n) nor a mean (value, low, high, n).") from error
