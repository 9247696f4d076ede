"""The methods by name with their documented default settings, and the order of their cells."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

from benchmarks.frontier.cells import Cell
from peft_safety.errors import ConfigError

POISONS = (0.0, 0.1, 0.5, 1.0)
SEEDS = (0, 1, 2)
MODULES = 35
"""Modules of 210 for Safe LoRA's "number": the same share as in the reference code (10 of 64)."""
BLIND = ("guard", "blind")
"""Arms with a null space of inputs."""
BARE = Cell().without_basis("lora")
"""Plain LoRA. Methods without GuardSpace's fields are variants of it."""
GUARD = Cell()
ANCHOR = "anchor=4,anchor_every=1,anchor_weight=1"
COUNTERMEASURES: dict[str, Cell] = {
    "frozen-own": replace(GUARD, knobs="train=B,rows=task,own=3"),
    "frozen-system": replace(GUARD, knobs="train=B,rows=task,own=1,own_kind=system"),
    "chain": replace(GUARD, knobs="train=B,rows=task,contexts=5,screen=verdict"),
    "chain-flagged": replace(GUARD, knobs="train=B,rows=task,contexts=5,screen=flagged"),
    "chain-anchor": replace(GUARD, knobs=f"train=B,rows=task,contexts=5,screen=verdict,{ANCHOR}"),
    "frozen-screened": replace(GUARD, knobs="train=B,rows=task,screen=verdict"),
    "frozen-flagged": replace(GUARD, knobs="train=B,rows=task,screen=flagged"),
    "random:frozen-flagged": replace(GUARD, knobs="train=B,rows=task,screen=flagged", control="random"),
    "chain-system": replace(GUARD, knobs="train=B,rows=task,screen=flagged,own=1,own_kind=system"),
    "chain-own": replace(GUARD, knobs="train=B,rows=task,screen=flagged,own=3"),
    "chain-clean": replace(GUARD, knobs="train=B,rows=task,screen=flagged,own=3,clean=1"),
    "frozen-clean": replace(GUARD, knobs="train=B,rows=task,own=3,clean=1"),
    "frozen-context": replace(GUARD, knobs="train=B,rows=task,contexts=5"),
    "frozen-anchor": replace(GUARD, knobs=f"train=B,rows=task,{ANCHOR}"),
    "lora-screened": replace(BARE, arm="screened", knobs="screen=verdict"),
    "lora-flagged": replace(BARE, arm="screened", knobs="screen=flagged"),
    "lora-anchor": replace(BARE, arm="anchored", knobs=ANCHOR),
    "lora-anchor-everyday": replace(BARE, arm="anchored", knobs=f"{ANCHOR},anchor_on=everyday"),
}
"""Against attacks: screen the rows, calibrate in context, hold answers at an anchor; all of it, each alone, a control.
"-flagged" drops all that the screen flags, without the model's verdict.
"""
METHODS: dict[str, Cell] = {
    "aligned": Cell().without_basis("aligned"),
    "lora": BARE,
    "guardspace": GUARD,
    "frozen": replace(GUARD, knobs="train=B,rows=task"),
    "frozen-random": replace(GUARD, knobs="train=B,rows=random"),
    "frozen-r16": replace(GUARD, knobs="train=B,rows=task,r=16"),
    "window-64": replace(GUARD, knobs="train=window,rows=task,window=64"),
    "window-256": replace(GUARD, knobs="train=window,rows=task,window=256"),
    "task-frozen": replace(BARE, arm="task", knobs="train=B"),
    "task-trained": replace(BARE, arm="task", knobs="train=A"),
    "blind": replace(GUARD, arm="blind"),
    "guardspace-general": replace(GUARD, basis="general"),
    "safe-lora": replace(BARE, arm="safe_lora", knobs="projection=frobenius,select=threshold,threshold=0.35"),
    "safe-lora-number": replace(
        BARE, arm="safe_lora", knobs=f"projection=frobenius,select=number,num_modules={MODULES}"
    ),
    "safe-lora-topk": replace(BARE, arm="safe_lora", knobs="projection=topk,select=all,rank=32"),
    "safe-lora-soft": replace(BARE, arm="safe_lora", knobs="projection=soft,select=all,rank=32,penalty=4"),
    "salora-32": replace(BARE, arm="salora", knobs="k=32"),
    "salora-0.9": replace(BARE, arm="salora", knobs="k=0.9"),
    "both-sides": replace(GUARD, knobs="combine=salora,k=32"),
    "lora-mixed": replace(BARE, arm="mixed", knobs="share=0.1"),
    "patch-reattached": replace(BARE, arm="reattach"),
    "patch-stacked": replace(BARE, arm="patch", knobs="steps=24,unseen=1"),
    "somf": replace(BARE, arm="somf", knobs="lr=0.1,steps=16,unseen=1"),
}
"""Documented defaults: as published, or the package's own."""
RANDOM = (
    "guardspace",
    "frozen",
    "window-64",
    "blind",
    "salora-32",
    "salora-0.9",
    "both-sides",
    "safe-lora-topk",
    "safe-lora-soft",
    "patch-stacked",
    "somf",
)
SCALED = (
    "guardspace",
    "frozen",
    "blind",
    "guardspace-general",
    "both-sides",
    "salora-32",
    "salora-0.9",
    "safe-lora",
    "safe-lora-number",
    "safe-lora-topk",
    "safe-lora-soft",
    "somf",
)
NF4 = ("aligned", "lora", "guardspace")
METHODS |= {f"random:{name}": replace(METHODS[name], control="random") for name in RANDOM}
METHODS |= {f"scaled:{name}": replace(METHODS[name], control="scaled") for name in SCALED}
METHODS |= {f"{name}-nf4": replace(METHODS[name], load="nf4") for name in NF4}
PLANNED = dict(METHODS)
"""The methods of the frontier."""
METHODS |= COUNTERMEASURES
SEEN = {
    f"{kind}{name}-seen": replace(METHODS[f"{kind}{name}"], knobs=METHODS[name].knobs.removesuffix(",unseen=1"))
    for kind, name in (
        ("", "patch-stacked"),
        ("random:", "patch-stacked"),
        ("", "somf"),
        ("random:", "somf"),
        ("scaled:", "somf"),
    )
}
"""Trained on requests that the poison has, too, which helps them: in older results only."""
METHODS |= SEEN

CORE = (
    "aligned",
    "lora",
    "guardspace",
    "frozen",
    "blind",
    "task-frozen",
    "random:guardspace",
    "random:frozen",
    "random:blind",
    "scaled:guardspace",
)
SMOKE = ("aligned", "lora", "safe-lora-soft", "guardspace", "random:guardspace")
GROUPS = {
    "core": CORE,
    "smoke": SMOKE,
    "controls": tuple(name for name in PLANNED if ":" in name),
    "nf4": tuple(f"{name}-nf4" for name in NF4),
    "main": tuple(name for name in PLANNED if ":" not in name and not name.endswith("-nf4")),
    "all": tuple(PLANNED),
}
FIRST_POISON = 0.1
"""Where the methods differ most."""


def named(names: Sequence[str]) -> list[str]:
    """Methods by name or group, each once.

    Raises:
        ConfigError: an unknown one.
    """
    listed: list[str] = []
    for name in names:
        if name not in METHODS and name not in GROUPS:
            close = difflib.get_close_matches(name, [*METHODS, *GROUPS], 1)
            hint = f"Did you mean {close[0]!r}? " if close else ""
            raise ConfigError(
                f"method {name!r} is unknown. {hint}Methods: {', '.join(METHODS)}; groups: {', '.join(GROUPS)}."
            )
        listed += GROUPS.get(name, (name,))
    return list(dict.fromkeys(listed))


def place(method: Cell, poison: float, seed: int, split: str) -> Cell:
    """A method at one place of the grid; "aligned" has no rows and no seed."""
    return (
        replace(method, split=split)
        if method.arm == "aligned"
        else replace(method, poison=poison, seed=seed, split=split)
    )


def plan(
    methods: Sequence[Cell], poisons: Sequence[float] = POISONS, seeds: Sequence[int] = SEEDS, split: str = "test"
) -> list[Cell]:
    """All cells, most informative first: one seed after another; for each seed the core methods first, and the
    share of poison where methods differ most.

    A control follows its method. Cells that use the same plain adapter are next to each other.
    """
    order = sorted(poisons, key=lambda p: (p != FIRST_POISON, p == 1.0, p))
    core = [METHODS[name] for name in CORE]
    return list(
        dict.fromkeys(
            place(method, poison, seed, split)
            for seed in seeds
            for chosen in ([m for m in methods if m in core], [m for m in methods if m not in core])
            for poison in order
            for method in chosen
        )
    )


@cache
def name_of(cell: Cell) -> str:
    """The name of a cell's method, with the settings that are not its defaults."""
    bare = cell.method
    for name, method in METHODS.items():
        if method.method == bare:
            return name
    alike = [
        name
        for name, method in METHODS.items()
        if (method.arm, method.control, method.load) == (cell.arm, cell.control, cell.load)
    ]
    if not alike:
        return cell.label()
    said = {name: difference(METHODS[name], cell) for name in alike}
    knobs = set(cell.options())
    name = min(alike, key=lambda name: said[name].count("=") + len(METHODS[name].options().keys() - knobs))  # nearest
    return f"{name} with {said[name]}"


def difference(default: Cell, cell: Cell) -> str:
    """The settings that differ from the default, as text for `--set`."""
    fields = ("basis", "fraction", "positions", "calibration", "epochs", "lr")
    said = [f"{name}={getattr(cell, name)}" for name in fields if getattr(cell, name) != getattr(default, name)]
    before = default.options()
    return ",".join(said + [f"{name}={value}" for name, value in cell.options().items() if before.get(name) != value])


def with_setting(method: Cell, setting: str) -> Cell:
    """A method with other settings: fields of the cell, or knobs of its arm.

    Raises:
        ConfigError: a setting the method does not have.
    """
    knobs, fields = method.options(), {}
    settable = ("epochs", "lr", *(("basis", "fraction", "positions", "calibration") if method.arm in BLIND else ()))
    for name, value in replace(method, knobs=setting).options().items():
        if name in knobs:
            knobs[name] = value
        elif name in settable:
            fields[name] = value
        else:
            raise ConfigError(
                f"{name_of(method)} has no setting {name!r}. It has {', '.join(dict.fromkeys([*knobs, *settable]))}."
            )
    return replace(method, knobs=",".join(f"{name}={value}" for name, value in knobs.items()), **fields)


def settings_of(texts: Sequence[str]) -> list[Cell]:
    """Methods with settings, from METHOD:NAME=VALUE[,...] each.

    Raises:
        ConfigError: an unknown method, or a setting that it does not have.
    """
    settings = []
    for text in texts:
        name, colon, setting = text.partition(":")
        if ":" in setting:  # the name of a control has a colon of its own
            rest, _, setting = setting.partition(":")
            name = f"{name}:{rest}"
        if not colon:
            raise ConfigError(f"--set {text!r}: write METHOD:NAME=VALUE, for example guardspace:fraction=0.5.")
        settings.append(with_setting(METHODS[named([name])[0]], setting))
    return settings
