"""The cells: topic A for choices, topic B for the table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.frontier.cells import Cell
from benchmarks.frontier.plan import METHODS, place
from benchmarks.topic.bench import UNALIGNED

FROZEN, RANDOM, MIXED = "frozen", "random:frozen", "lora-mixed"
FRACTIONS = (1 / 8, 1 / 4, 1 / 2)
"""Of the null space, tried on topic A."""
ATTACKS = ("", "trigger", "however", "wrapper", "cipher")


@dataclass(frozen=True)
class Strength:
    """How hard an attack tries: share of the rows, epochs."""

    poison: float
    epochs: int = 1


WEAK, STRONG = Strength(0.1), Strength(0.5, 4)
SPLITS = {"A": "validation", "B": "test"}


def at(method: Cell, attack: str, strength: Strength, split: str, seed: int = 0) -> Cell:
    """A defense under an attack."""
    return replace(place(method, strength.poison, seed, split), attack=attack, epochs=strength.epochs)


def untrained(split: str) -> list[Cell]:
    """The model before its alignment, and after it."""
    aligned = replace(METHODS["aligned"], split=split)
    return [aligned, replace(aligned, arm=UNALIGNED)]


def plan(topic: str) -> list[Cell]:
    """All cells of a topic, those that say most first."""
    split = SPLITS[topic]
    if topic == "A":
        settings = [METHODS["lora"], *(replace(METHODS[FROZEN], fraction=fraction) for fraction in FRACTIONS)]
        return [*untrained(split), *_under(("", "trigger"), settings, STRONG, split)]
    both, few = [METHODS["lora"], METHODS[FROZEN]], ("", "trigger")
    return [
        *untrained(split),
        *_under(ATTACKS, both, STRONG, split),
        *_under(few, both, WEAK, split),
        *_under(few, [METHODS[MIXED]], STRONG, split),
        *_under(("",), [METHODS[RANDOM]], STRONG, split),
        *_under(few, [METHODS[MIXED]], WEAK, split),
        *_under(("",), [METHODS[RANDOM]], WEAK, split),
        *_under(("however",), both, WEAK, split),
    ]


def _under(attacks: Sequence[str], methods: Sequence[Cell], strength: Strength, split: str) -> list[Cell]:
    return [at(method, attack, strength, split) for attack in attacks for method in methods]
