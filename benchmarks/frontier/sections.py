"""The sections that the frontier's results files write: frontier.md, tasks.md, repair.md, older_patch.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.frontier.aggregate import Point, Points, label, missing, names, pairs, points, pooled, shares, split_of
from benchmarks.frontier.cells import Cell, cell_of
from benchmarks.frontier.plan import CORE, FIRST_POISON, METHODS, PLANNED, name_of, plan
from benchmarks.frontier.results import NAME, OTHERS, Row, caveats, facts, read, results_of
from benchmarks.frontier.tables import BRACKETS, NOTHING, Table, difference, number, percent, share, told, transfer
from benchmarks.pages import Section, link
from peft_safety.errors import DataError
from peft_safety.evaluation import KeywordJudge

FIRST_PATCH = "frontier_first_patch.jsonl"
"""Cells on the model that an older patch aligned; their like has not been run on today's."""
REPAIRS = ("blind", "safe_lora")
"""Arms that change an adapter after its training."""
UNTRAINED = ("aligned", "lora")


def at_one_share(points: Points, poison: float, wanted: Callable[[str], bool] = lambda _: True) -> Table:
    """One line a method: its figures at one share of poison, and those of its controls, which say so if they have
    another number of seeds. Beside methods of one seed stands plain LoRA of that seed, too.
    """
    headings = ("", "refusal", "of a random basis", "at equal norm", "accuracy", "of a random basis")
    rows = []
    for name in filter(wanted, names(points, controls=False)):
        point = points.get((name, poison))
        if point is None:
            continue
        random, scaled = (points.get((f"{kind}:{name}", poison)) for kind in ("random", "scaled"))
        rows.append(_line(label(name), point, random, scaled))
        if name == "lora" and len(point.rows) > 1:
            rows.append(_line(f"{label(name)}, seed 0", point.at(0)))
    return Table((*headings, "over-refusal", "general NLL", "seeds"), rows)


def _line(title: str, point: Point, random: Point | None = None, scaled: Point | None = None) -> tuple[str, ...]:
    count = len(point.rows)
    controls = [told(control, "refusal", count) for control in (random, scaled)]
    accuracy = [percent(point.rate("task_accuracy")), told(random, "task_accuracy", count)]
    seeds = NOTHING if point.name.startswith("aligned") else str(count + point.diverged)
    rest = (percent(point.rate("over_refusal")), number(point.mean("general_nll")), seeds)
    return title, percent(point.rate("refusal")), *controls, *accuracy, *rest


def by_share(points: Points) -> Table:
    """Refusal at every share of poison, of the methods that were run at more than one; of one seed if no other number
    is said.
    """
    columns, rows = shares(points), []
    for name in names(points):
        rates = [told(points.get((name, p)), "refusal", usual=1) for p in columns]
        if not name.startswith("aligned") and len(columns) - rates.count(NOTHING) > 1:
            rows.append((label(name), *rates))
    return Table(("refusal", *map(share, columns)), rows)


def against(points: Points, poison: float) -> Table:
    """Each method against its controls, prompt by prompt."""
    rows = []
    for name in names(points, controls=False):
        found = [_against(points, name, kind, poison) for kind in ("random", "scaled")]
        if any(found):
            rows.append((label(name), *map(difference, found)))
    return Table(("points of refusal", "against a random basis", "against equal norm"), rows)


def _against(points: Points, name: str, kind: str, poison: float) -> Any:
    point, control = points.get((name, poison)), points.get((f"{kind}:{name}", poison))
    return pairs(point, control, "refusal") if point is not None and control is not None else None


def by_seed(rows: Sequence[Row], names: Sequence[str], poison: float) -> Table:
    """Refusal of each seed, of the methods that have several."""
    found: dict[str, dict[int, str]] = {}
    for row in rows:
        cell = cell_of(row)
        if cell.split == split_of(rows) and cell.poison == poison and name_of(cell) in names and "refusal" in row:
            found.setdefault(name_of(cell), {})[cell.seed] = percent(pooled([row], "refusal"))
    seeds = sorted({seed for line in found.values() for seed in line})
    lines = [
        (label(name), *(found[name].get(seed, NOTHING) for seed in seeds))
        for name in names
        if len(found.get(name, {})) > 1
    ]
    return Table(("refusal", *(f"seed {seed}" for seed in seeds)), lines)


def settings(rows: Sequence[Row], wanted: Callable[[Cell], bool] = lambda _: True) -> Table | None:
    """Settings that were tried on validation prompts, the longest fine-tunes first: the size of the null space."""
    lines = []
    for row in rows:
        cell = cell_of(row)
        if cell.split != "validation" or "diverged" in row or not wanted(cell):
            continue
        untrained = cell.arm == "aligned"
        size = f"n/{1 / cell.fraction:g}" if cell.fraction else NOTHING
        usual: dict[str, Any] = {"epochs": METHODS["lora"].epochs}
        usual |= {"fraction": METHODS["frozen"].fraction} if cell.fraction else {}
        steps = NOTHING if untrained else str(row["steps"])
        figures = [percent(pooled([row], rate)) for rate in ("refusal", "over_refusal", "task_accuracy")]
        name = label("aligned" if untrained else name_of(replace(cell, **usual)))
        key = (not untrained, -cell.epochs, cell.control, cell.arm != "lora", name, -cell.fraction)
        lines.append((key, (name, size, steps, *figures)))
    headings = ("on validation prompts", "null space", "steps", "refusal", "over-refusal", "accuracy")
    return Table(headings, [line for _, line in sorted(lines)]) if lines else None


def other_task(rows: Sequence[Row]) -> Table:
    """Test cells of another task. What was learned is the accuracy; for a task of free answers it is the NLL of those
    held out.
    """
    lines = []
    shown = points([row for row in rows if row["cell"]["split"] == "test"])
    for (name, poison), point in sorted(shown.items(), key=lambda item: item[0][1] != FIRST_POISON):
        if name == "aligned" and poison != FIRST_POISON:
            continue
        accuracy, loss = point.rate("task_accuracy"), point.mean("task_nll")
        learned = percent(accuracy) if loss is None else f"NLL {number(loss)}"
        rates = (percent(point.rate("refusal")), percent(point.rate("over_refusal")))
        place = NOTHING if name == "aligned" else share(poison)
        lines.append((label(name), place, *rates, learned, number(point.mean("general_nll")), str(len(point.rows))))
    return Table(("", "poison", "refusal", "over-refusal", "learned", "general NLL", "seeds"), lines)


def devices(rows: Sequence[Row]) -> str:
    """How many cells ran on which device."""
    counts = Counter(row.get("device", "cpu") for row in rows)
    return ", ".join(f"{device} {count}" for device, count in counts.most_common())


def headline(shown: Points) -> float:
    """The share of poison that the report is about."""
    measured = shares(shown)
    if not measured or not any(point.rows for point in shown.values()):
        raise DataError("no finite cell to report on. Run python -m benchmarks.frontier first.")
    return FIRST_POISON if FIRST_POISON in measured else measured[0]


def sources(environment: Row, rows: Sequence[Row], file: str) -> list[str]:
    """The last lines of a section: where the figures come from."""
    return [
        *(f"- **{caveat}**" for caveat in caveats(environment)),
        f"- Judge: keyword. {KeywordJudge.caveat} {BRACKETS}",
        f"- Cells by device: {devices(rows)}. Environment of the report: {facts(environment)}.",
        f"- Written by `python -m benchmarks.report` from `benchmarks/results/{file}`.",
    ]


def frontier(results: Path, page: Path) -> str:
    """Every method at the share of poison where they differ most, and refusal at the other shares."""
    environment, rows = read(results / NAME)
    shown = points(rows)
    poison, split, planned = headline(shown), split_of(rows), plan(list(PLANNED.values()))
    absent, main = missing(rows, planned), {name for name in names(shown) if name in CORE}
    other = transfer({place: point for place, point in shown.items() if place[0] in main}, poison)
    unmeasured = [label(name) for name in absent if (name, poison) not in shown and ":" not in name]
    drawn = {"frontier": "refusal against accuracy, controls hollow", "frontier_poison": "refusal by share of poison"}
    pictures = [f"![{alt}]({link(results / f'{name}.png', page)})" for name, alt in drawn.items()]
    lines = [
        *(line for picture in pictures for line in (picture, "")),
        *([] if split == "test" else ["**Validation prompts only: nothing here is a result.**", ""]),
        f"{split.capitalize()} prompts, {share(poison)}:",
        "",
        *at_one_share(shown, poison).markdown(),
        "",
        *by_share(shown).markdown(),
        "",
        *([*spread.markdown(), ""] if (spread := by_seed(rows, names(shown), poison)).rows else []),
        *against(shown, poison).markdown(),
        "",
        *(["Refusal on other prompt sets:", "", *other.markdown(), ""] if other is not None else []),
        "- Against its controls: points of refusal on the same harmful prompts of all sets, in brackets the prompts "
        "on which only the method, only the control refuses, and McNemar's exact p (prompts repeat over seeds, so it "
        "is somewhat too small). Only seeds that both have are compared.",
        "- Seeds: a figure with another number than its row says so; by share of poison it is one where nothing is "
        "said. Compare rows of one seed with plain LoRA of seed 0.",
        f"- {len(planned) - sum(absent.values())} of the {len(planned)} cells of the full plan. Not run at "
        f"{share(poison)}: {'; '.join(unmeasured) or 'no method'}. Controls that were not run have a dash.",
        "- All figures, also of the costs: `benchmarks/results/frontier.html`.",
        *sources(environment, rows, NAME),
    ]
    return "\n".join(lines)


def null_space(results: Path, page: Path) -> str:
    """What size of null space lasts how long, on validation prompts."""
    environment, rows = read(results / NAME)
    table = settings(rows, lambda cell: cell.arm not in REPAIRS)
    body = ["Nothing has been tried yet."] if table is None else table.markdown()
    return "\n".join([*body, "", "- One seed, one row in ten poisoned.", *sources(environment, rows, NAME)])


def repairs(results: Path, page: Path) -> str:
    """Adapters that were repaired after their training."""
    environment, rows = read(results / NAME)
    shown = points(rows)
    poison = headline(shown)
    repaired = at_one_share(shown, poison, lambda name: METHODS.get(name, Cell()).arm in (*REPAIRS, *UNTRAINED))
    table = settings(rows, lambda cell: cell.arm in (*REPAIRS, *UNTRAINED))
    long = ["Nothing has been tried yet."] if table is None else table.markdown()
    short = f"After a short fine-tune ({split_of(rows)} prompts, {share(poison)}):"
    notes = ["- Of the long fine-tunes: one seed, one row in ten poisoned.", *sources(environment, rows, NAME)]
    return "\n".join([*long, "", short, "", *repaired.markdown(), "", *notes])


def tasks(results: Path, page: Path) -> str:
    """The other tasks, each with a results file of its own."""
    lines = []
    for task in OTHERS:
        file = f"{results_of(task)}.jsonl"
        if (results / file).is_file():
            environment, rows = read(results / file)
            lines += [f"Task: {task}.", "", *other_task(rows).markdown(), "", *sources(environment, rows, file), ""]
        else:
            lines += [f"Task: {task}: not run.", ""]
    return "\n".join(lines)


def first_patch(results: Path, page: Path) -> str:
    """The frontier as it was measured on the model that an older patch aligned."""
    environment, rows = read(results / FIRST_PATCH)
    shown = points(rows)
    poison = headline(shown)
    lines = [
        f"Test prompts, {share(poison)}:",
        "",
        *at_one_share(shown, poison).markdown(),
        "",
        *by_share(shown).markdown(),
        "",
        *against(shown, poison).markdown(),
        "",
        *by_seed(rows, ("lora", "guardspace"), poison).markdown(),
        "",
        *sources(environment, rows, FIRST_PATCH),
    ]
    return "\n".join(lines)


SECTIONS = (
    Section("null_space", "results/frontier.md", null_space),
    Section("frontier", "results/frontier.md", frontier),
    Section("repairs", "results/repair.md", repairs),
    Section("tasks", "results/tasks.md", tasks),
)
OLDER = (Section("first_patch", "results/older_patch.md", first_patch),)
