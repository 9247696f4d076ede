"""The size of a protected subspace as every config, recipe and command takes it: `safety_rank`, `safety_energy` and
`safety_rank_pattern`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft_safety.errors import ConfigError


def check_size_options(
    safety_rank: Any, safety_energy: Any, safety_rank_pattern: Any, where: str, *, least: int = 1
) -> None:
    """Check the values before any model runs.

    Args:
        safety_rank: directions per module, an integer; or a share of its features, a float in (0, 1); None takes the
            method's default.
        safety_energy: instead, the share of the energy to hold, in (0, 1].
        safety_rank_pattern: other values by the end of a module's name: of the energy if `safety_energy` is given,
            otherwise of the rank.
        where: what the values belong to, for the errors.
        least: smallest number of directions.

    Raises:
        ConfigError: a value out of range, or both a rank and an energy.
    """
    if safety_rank is not None and safety_energy is not None:
        raise ConfigError(
            f"{where}: safety_rank={safety_rank!r} and safety_energy={safety_energy!r}: give one of them."
        )
    if safety_rank_pattern is not None and (
        not isinstance(safety_rank_pattern, Mapping) or not all(isinstance(kind, str) for kind in safety_rank_pattern)
    ):
        raise ConfigError(
            f"{where}: safety_rank_pattern={safety_rank_pattern!r}. Map the ends of module names to numbers: "
            "{'down_proj': 0.1}."
        )
    if safety_rank is not None:
        _check_rank(safety_rank, f"{where}: safety_rank", least)
    if safety_energy is not None:
        _check_energy(safety_energy, f"{where}: safety_energy")
    for kind, value in (safety_rank_pattern or {}).items():
        name = f"{where}: safety_rank_pattern[{kind!r}]"
        if safety_energy is None:
            _check_rank(value, name, 1)
        else:
            _check_energy(value, name)


def _check_rank(value: Any, name: str, least: int) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
    share = isinstance(value, float) and 0 < value < 1
    if not (whole or share):
        raise ConfigError(
            f"{name}={value!r}. Use a number of directions, an integer of at least {least}; or a share of the "
            "features, a float between 0 and 1."
        )


def _check_energy(value: Any, name: str) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= 1:
        raise ConfigError(f"{name}={value!r}. Use a share of the energy: above 0, at most 1.")
