"""The plan of the attacks: which defense meets which attack, how strong, and in what order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.frontier.attacks import ATTACKS
from benchmarks.frontier.cells import Cell
from benchmarks.frontier.plan import COUNTERMEASURES, METHODS, place
from peft_safety.errors import ConfigError

RECOMMENDED = "frozen"
PLAIN = "plain"
"""What people call the attack without a name."""
DEFENSES = ("lora", RECOMMENDED, "guardspace", "window-64", "lora-mixed", "safe-lora-soft", "blind", *COUNTERMEASURES)
PARTLY = ("salora-32", "patch-stacked", "somf")
"""Defenses that the plan attacks by the weak form of `FIRST` only."""
FIRST = ("trigger", "")
ORDER = ("trigger", "identity", "identities", "persona", "wrapper", "however", "cipher", "template", "foreign", "")
"""Those most likely to win come first."""
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Strength:
    """How hard an attack tries: share of the rows, epochs, learning rate as a multiple."""

    poison: float
    epochs: int = 1
    lr: float = 1.0


WEAK, STRONG = Strength(0.1), Strength(0.5, 4)
HARDER = (Strength(1.0), Strength(1.0, 4), Strength(0.1, 1, 3.0), Strength(0.1, 1, 10.0), Strength(0.1, 16))
"""Of the plain attack: every row, longer, at a higher rate."""
LEFTOVER = Strength(0.05, 4)
"""Of the trigger: what is left of its strong form if a screen drops nine rows of ten."""
BENIGN = Strength(0.5)
"""Of the benign outliers."""


def at(method: Cell, attack: str, strength: Strength, seed: int, split: str) -> Cell:
    """A defense under an attack."""
    cell = replace(place(method, strength.poison, seed, split), attack=attack)
    return replace(cell, epochs=strength.epochs, lr=cell.lr * strength.lr) if method.arm != "aligned" else cell


def attacks(only: Sequence[str], strength: Strength | None = None) -> list[tuple[str, Strength]]:
    """All attacks with their strengths, the strong ones first; or all at one strength."""
    if strength is None:
        listed = [(name, chosen) for chosen in (STRONG, WEAK) for name in ORDER]
        listed += [("outliers", BENIGN), *(("", harder) for harder in HARDER), ("trigger", LEFTOVER)]
    else:
        listed = [(name, strength) for name in (*ORDER, "outliers")]
    return [(name, chosen) for name, chosen in listed if not only or (name or PLAIN) in only]


def plan(
    defenses: Sequence[str] = (*DEFENSES, *PARTLY),
    only: Sequence[str] = (),
    split: str = "test",
    *,
    strength: Strength | None = None,
    settings: Sequence[Cell] = (),
) -> list[Cell]:
    """All cells: for each attack the aligned model, plain LoRA and the recommended defense, then the other defenses
    and the `settings` of methods, then two more seeds of the first two.

    Raises:
        ConfigError: an unknown defense or attack.
    """
    unknown = sorted(set(defenses) - METHODS.keys()) + sorted(set(only) - ATTACKS.keys() - {PLAIN})
    if unknown:
        known = ", ".join(filter(None, ATTACKS))
        raise ConfigError(f"{unknown[0]!r} is neither a method of the frontier nor an attack ({known}, plain).")
    listed = attacks(only, strength)
    first = [METHODS[name] for name in ("lora", RECOMMENDED) if name in defenses]
    everywhere = [METHODS[name] for name in defenses if name not in PARTLY]
    others = [method for method in (*everywhere, *settings) if method not in first]
    partly = [METHODS[name] for name in defenses if name in PARTLY]
    cells = []
    for seed, methods in [(0, first), (0, others), *((seed, first) for seed in SEEDS[1:])]:
        for attack, chosen in listed:
            if ATTACKS[attack].forms:
                cells.append(at(METHODS["aligned"], attack, chosen, 0, split))
            cells += [at(method, attack, chosen, seed, split) for method in methods]
            if methods is others and (strength is not None or (attack in FIRST and chosen == WEAK)):
                cells += [at(method, attack, chosen, seed, split) for method in partly]
    return list(dict.fromkeys([at(METHODS["aligned"], "", WEAK, 0, split), *cells]))
