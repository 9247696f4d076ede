"""Checks of option values."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, get_args

from peft_safety.errors import ConfigError


def is_number(value: Any, low: float = -math.inf, high: float = math.inf) -> bool:
    """Whether this is a finite number from `low` to `high`; True and False are none."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value) and low <= value <= high


def check_choices(options: Any, **choices: Any) -> None:
    """Refuse a field of `options` whose value is not one of its `Literal` type's."""
    for name, literal in choices.items():
        if (value := getattr(options, name)) not in get_args(literal):
            known = ", ".join(map(str, get_args(literal)))
            raise ConfigError(f"{type(options).__name__}: {name}={value!r}. Use one of {known}.")


def check_positive(options: Any, *names: str) -> None:
    """Refuse a field of `options` that is not a finite number above 0."""
    for name in names:
        if not (is_number(value := getattr(options, name)) and value > 0):
            raise ConfigError(f"{type(options).__name__}: {name}={value!r}. Use a positive number.")


def check_counts(options: Any, *names: str) -> None:
    """Refuse a field of `options` that is not a whole number above 0."""
    for name in names:
        value = getattr(options, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{type(options).__name__}: {name}={value!r}. Use a positive whole number.")


def whole(rank: float | None) -> int | float | None:
    """A whole number of directions as an integer; a share as it is."""
    return rank if rank is None or rank % 1 else int(rank)


def size_pattern(pairs: Iterable[str] | None) -> dict[str, int | float] | None:
    """A mapping from pairs such as `down_proj=0.1`: a number for a kind of module."""
    sizes: dict[str, int | float] = {}
    for pair in pairs or ():
        kind, _, text = pair.partition("=")
        try:
            sizes[kind.strip()] = float(text) if "." in text else int(text)
        except ValueError as error:
            message = f"safety-rank-pattern {pair!r}. Write a kind of module and a number: down_proj=0.1."
            raise ConfigError(message) from error
    return sizes or None
