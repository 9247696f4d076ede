"""Layers without a basis, which adapters leave out too: they must not be trained unprotected."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping

from peft_safety.core.names import listed
from peft_safety.core.subspace import NARROW, UNREACHED

SAID = {UNREACHED: "no token that counts reaches", NARROW: "a single feature leaves no direction free in"}


def record(unreached: Iterable[str], narrow: Iterable[str]) -> dict[str, dict[str, list[str]]]:
    """The `left_out` entry of the provenance; empty if no layer is left out."""
    result = {UNREACHED: sorted(unreached), NARROW: sorted(narrow)}
    result = {reason: names for reason, names in result.items() if names}
    return {"left_out": result} if result else {}


def warn_left_out(left_out: Mapping[str, str], total: int, what: str, *, stacklevel: int = 3) -> None:
    """One warning that counts and names the layers (with reasons) that are left out of `what`."""
    if not left_out:
        return
    by_reason = {reason: [name for name, why in left_out.items() if why == reason] for reason in SAID}
    reasons = "; ".join(f"{SAID[reason]} {listed(names)}" for reason, names in by_reason.items() if names)
    warnings.warn(
        f"{len(left_out)} of {total} target layers are left out of {what}: {reasons}.", stacklevel=stacklevel + 1
    )
