"""Many modules in few words: how errors and warnings name a set of them, and the pattern that leaves exactly those
out.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable

SHOWN = 3
"""Names that a message spells out."""


def some(names: Collection[str]) -> str:
    """`a, b, c and 21 more`."""
    first = sorted(names)[:SHOWN]
    rest = len(names) - len(first)
    return ", ".join(first) + (f" and {rest} more" if rest else "")


def pattern(names: Iterable[str], others: Iterable[str] = ()) -> str:
    """A regular expression that matches the full names of some modules and none of the others: what `exclude_modules`
    takes.

    Where a whole subtree is meant it says so, and numbered layers are one term:
    `model\\.vision_tower\\..*|model\\.layers\\.\\d+\\.mlp\\.gate`.
    """
    names, others = set(names), set(others) - set(names)
    inner = {parent for other in others for parent in _parents(other)}  # modules that hold one of the others
    terms: list[str] = []
    for name in sorted(names):
        if any(re.fullmatch(term, name) for term in terms):
            continue
        top = next(
            (
                parent
                for parent in _parents(name)
                if parent not in inner and sum(n.startswith(f"{parent}.") for n in names) > 1
            ),
            None,
        )
        exact = re.escape(name) if top is None else re.escape(top) + r"\..*"
        broad = re.sub(r"(?<=\\\.)\d+(?=\\\.|$)", r"\\d+", exact)
        terms.append(exact if any(re.fullmatch(broad, other) for other in others) else broad)
    return "|".join(terms)


def _parents(name: str) -> list[str]:
    """The modules around one, outermost first."""
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts))]


def public_name(label: str) -> str:
    """A Hub id or an adapter's name as it is; of a local path only the last part."""
    return os.path.basename(os.path.normpath(label)) if os.path.isabs(label) or os.path.exists(label) else label
