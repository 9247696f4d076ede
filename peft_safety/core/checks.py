"""Checks of option values."""

from __future__ import annotations

import math
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
