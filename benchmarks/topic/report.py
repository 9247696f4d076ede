"""The report on results/topic.jsonl: the table, a picture, and a section of the results page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS
from benchmarks.frontier.aggregate import LABELS, label
from benchmarks.frontier.attacks import ATTACKS
from benchmarks.frontier.cells import Cell, cell_of
from benchmarks.frontier.plan import METHODS, name_of
from benchmarks.frontier.results import Row, facts, read
from benchmarks.frontier.sections import devices
from benchmarks.frontier.tables import Table
from benchmarks.pages import DOCS, Section, link, write, written
from benchmarks.topic.bench import UNALIGNED
from benchmarks.topic.data import TOPICS
from benchmarks.topic.judge import ContentJudge
from benchmarks.topic.plan import plan
from peft_safety.errors import DataError
from peft_safety.evaluation import KeywordJudge, Rate, Verdict
from peft_safety.evaluation.judges import agreement
from peft_safety.reporting import style

BENCHMARK, NAME = "topic", "topic.jsonl"
KEYWORD, CONTENT = KeywordJudge.name, ContentJudge.name
LETTERS = {"R": "refusal", "C": "compliance", "O": "other"}
UNTRAINED = ("aligned", UNALIGNED)
SHORT = {"lora": "LoRA", "frozen": "frozen", "random:frozen": "random", "lora-mixed": "mixed"}
"""Defenses in the head of the table."""


def named(cell: Cell) -> str:
    """The defense of a cell; with its settings where they are not the documented ones."""
    if cell.arm == UNALIGNED:
        return UNALIGNED
    return name_of(replace(cell, epochs=1) if cell.epochs > 1 else cell)


def title(cell: Cell) -> str:
    """An attack in a few letters."""
    return f"{cell.attack or 'plain'} {cell.poison:g}" + (f" x{cell.epochs}" if cell.epochs > 1 else "")


def main_rows(rows: Sequence[Row], key: str = "B") -> list[tuple[Cell, Row]]:
    """The finite cells of a topic, the weak attacks first."""
    finite = [(cell_of(row), row) for row in rows if row["topic"] == key and "forms" in row]
    order = {name: index for index, name in enumerate(ATTACKS)}
    return sorted(finite, key=lambda one: (order[one[0].attack], one[0].epochs, one[0].poison))


def table(cells: Sequence[tuple[Cell, Row]]) -> Table:
    """Compliance by content / by keyword, in per cent: a line for each attack and tested form, a column a defense."""
    names = list(dict.fromkeys(named(cell) for cell, _ in cells if cell.arm not in UNTRAINED))
    names.sort(key=lambda name: (list(METHODS).index(name) if name in METHODS else len(METHODS), name))
    before = {named(cell): row["forms"] for cell, row in cells if cell.arm in UNTRAINED}
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for cell, row in cells:
        if cell.arm in UNTRAINED:
            continue
        for form, rates in row["forms"].items():
            lines.setdefault((title(cell), form), {})[named(cell)] = _pair(rates)
    for key, line in lines.items():
        line |= {name: _pair(forms[key[1]]) for name, forms in before.items() if key[1] in forms}
    columns = [*(name for name in (UNALIGNED, "aligned") if name in before), *names]
    shown = [(*key, *(line.get(name, "-") for name in columns)) for key, line in lines.items()]
    return Table(("attack", "form", *(SHORT.get(name, name) for name in columns)), shown, labels=2)


def _pair(rates: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Compliance by content, and what the keyword matcher does not call a refusal."""
    return f"{100 * rates[CONTENT]['compliance']['value']:.0f} / {100 - 100 * rates[KEYWORD]['refusal']['value']:.0f}"


def summary(cells: Sequence[tuple[Cell, Row]]) -> Table:
    """A line a defense: where most answers comply by content, and over-refusal (keyword) and accuracy under the
    weakest plain attack that ran.
    """
    worst: dict[str, tuple[Rate, str]] = {}
    prices: dict[str, tuple[str, ...]] = {}
    for cell, row in cells:
        name, (form, rates) = named(cell), max(row["forms"].items(), key=_complied)
        rate = Rate(*(rates[CONTENT]["compliance"][count] for count in ("k", "n")))
        if name not in worst or rate.value > worst[name][0].value:
            worst[name] = rate, form if cell.arm in UNTRAINED else f"{title(cell)}, {form}"
        if cell.attack == "":
            told = [row["over_refusal"], row["transfer"]["everyday"], row["transfer"]["task"], row["task_accuracy"]]
            prices.setdefault(name, tuple(f"{100 * one['value']:.0f}" for one in told))
    lines = [
        (SHORT.get(name, name), at, str(rate), *prices.get(name, ("-",) * 4)) for name, (rate, at) in worst.items()
    ]
    return Table(("", "worst attack, form", "compliance", "near", "everyday", "task", "accuracy"), lines, labels=2)


def _complied(form: tuple[str, Any]) -> float:
    value: float = form[1][CONTENT]["compliance"]["value"]
    return value


def _label(name: str) -> str:
    return label(name) if name in LABELS else name


def pairs_of(cells: Sequence[tuple[Cell, Row]]) -> list[tuple[str, str]]:
    """Both judges' verdicts on all questions and forms of all cells, as letters."""
    forms = [verdicts for _, row in cells for verdicts in row["form_verdicts"].values()]
    return [pair for verdicts in forms for pair in zip(verdicts[KEYWORD], verdicts[CONTENT], strict=True)]


def counted(pairs: Sequence[tuple[str, str]]) -> Table:
    """How often each pair of verdicts was given."""
    counts = Counter(pairs)
    head = ("keyword", *(f"content: {LETTERS[letter]}" for letter in "RCO"))
    return Table(head, [(LETTERS[first], *(str(counts[first, second]) for second in "RCO")) for first in "RCO"])


def agreed(pairs: Sequence[tuple[str, str]]) -> str:
    """How far the judges agree, on all verdicts and on whether an answer complies."""
    first, second = ([Verdict(LETTERS[pair[side]]) for pair in pairs] for side in (0, 1))
    found = agreement(first, second)
    kappa = "not defined" if found["kappa"] is None else f"{found['kappa']:.2f}"
    complied = [pair for pair in pairs if "C" in pair]
    both = sum(pair == ("C", "C") for pair in complied)
    return (
        f"The judges agree on {100 * found['share']:.0f} % of {found['n']} answers (Cohen's kappa {kappa}); of "
        f"{len(complied)} answers that either calls compliance both do so in {both}."
    )


def examples(cells: Sequence[tuple[Cell, Row]], count: int = 5) -> list[str]:
    """Some answers on which the judges differ, as lines of the page: one of each kind of difference first, then from
    as many cells as can be. The unaligned model's come last.
    """
    order = sorted(cells, key=lambda pair: pair[0].arm == UNALIGNED)
    differ = [
        (cell, row["examples"][turn]) for turn in range(count) for cell, row in order if turn < len(row["examples"])
    ]
    kinds = {(one[KEYWORD], one[CONTENT]): index for index, (_, one) in reversed([*enumerate(differ)])}
    chosen: dict[str, str] = {}
    for cell, one in [differ[index] for index in kinds.values()] + differ:
        said = " ".join(one["answer"].replace("|", " ").split())
        verdicts = f"keyword: {LETTERS[one[KEYWORD]]}, content: {LETTERS[one[CONTENT]]}"
        line = f"- {verdicts} ({named(cell)}, {title(cell)}). *{one['prompt']}* {said[:240]}"
        if len(chosen) < count:
            chosen.setdefault(one["prompt"], line)
    return list(chosen.values())


def section(results: Path, page: Path) -> str:
    """The section of the page, as markdown.

    Raises:
        DataError: no results on topic B.
    """
    environment, rows = read(results / NAME, BENCHMARK)
    cells = main_rows(rows)
    if not cells:
        raise DataError(f"{results / NAME} has no cell of topic B. Run python -m benchmarks.topic --topic B first.")
    n = max(rates[CONTENT]["compliance"]["n"] for _, row in cells for rates in row["forms"].values())
    pairs = pairs_of(cells)
    choices, ran = main_rows(rows, "A"), {named(cell) for cell, _ in cells}
    lines = [
        f"![compliance by content and by keyword]({link(results / 'topic.png', page)})",
        "",
        f"Answers to {n} test questions on {TOPICS['B']} that comply by content, under the attack that makes most; "
        "over-refusal by keyword and task accuracy under the plain attack; per cent.",
        "",
        *summary(cells).markdown(),
        "",
        f"Per cent of {n} test questions on {TOPICS['B']}: compliance by content / not refused by keyword.",
        "",
        *table(cells).markdown(),
        "",
        "",
        "Both judges on all questions and forms:",
        "",
        *counted(pairs).markdown(),
        "",
        agreed(pairs),
        "",
        *examples(cells),
        "",
        *(
            ["Choices, validation questions on " + TOPICS["A"] + ":", "", *table(choices).markdown(), ""]
            if choices
            else []
        ),
        f"- 95 % intervals are at most {_widest(n):.0f} points to either side. One seed; {len(cells)} of the "
        f"{len(plan('B'))} cells of the plan are there.",
        f"- {'; '.join(f'{short}: {_label(name)}' for name, short in SHORT.items() if name in ran)}.",
        f"- {ContentJudge.caveat} {KeywordJudge.caveat}",
        f"- Cells by device: {devices(rows)}. Environment: {facts(environment)}.",
        "- Written by `python -m benchmarks.report topic` from `benchmarks/results/topic.jsonl`.",
    ]
    return "\n".join(lines)


def _widest(n: int) -> float:
    """Half of the widest interval of a share of `n`, in points."""
    low, high = Rate(n // 2, n).interval
    return 50 * (high - low)


def picture(cells: Sequence[tuple[Cell, Row]], path: Path) -> Path:
    """Compliance by content with its 95 % interval, and what the keyword matcher does not call a refusal: a line for
    each attack and defense, worst form.
    """
    worst = [
        (named(cell), title(cell), max(row["forms"].items(), key=_complied)[1])
        for cell, row in cells
        if cell.arm not in UNTRAINED
    ]
    heading = f"Answers to test questions on {TOPICS['B']}, worst form"
    note = "● real answers by content, with 95 % intervals; | not refused by keyword"
    with style.picture(path, 0.6 + 0.32 * len(worst), title=heading, note=note) as (_, (panel,)):
        for y, (name, _, rates) in enumerate(worst):
            rate = Rate(*(rates[CONTENT]["compliance"][count] for count in ("k", "n")))
            low, high = rate.interval
            style.point(panel, 100 * rate.value, y, style.color_of(name), (100 * low, 100 * high), hollow=":" in name)
            passed = 100 * (1 - rates[KEYWORD]["refusal"]["value"])
            panel.plot(passed, y, "|", color=style.INK, ms=11, mew=1.8, clip_on=False)
        panel.set_yticks(range(len(worst)), [f"{attack}: {_label(name)}" for name, attack, _ in worst])
        panel.set(xlim=(-3, 103), ylim=(len(worst) - 0.4, -0.6), xlabel="% of the questions")
        panel.tick_params(axis="y", length=0)
        panel.grid(axis="x")
    return path


SECTIONS = (Section("topic", "results/topic.md", section),)


def report(out: Path = RESULTS, docs: Path | None = DOCS) -> None:
    """Print the table, write the picture next to the results, and the section of the page.

    Raises:
        DataError: no results on topic B, or a page without markers. Nothing is written then.
    """
    pages = {} if docs is None else written(SECTIONS, out, docs)
    cells = main_rows(read(out / NAME, BENCHMARK)[1])
    path = picture(cells, out / "topic.png")
    print("\n".join([*summary(cells).markdown(), "", *table(cells).markdown()]))
    write(pages)
    print(f"wrote {path}" + "".join(f" and the section of {page}" for page in pages))
