"""The summary of docs/results/README.md: a line a method, what was measured, and a verdict; what fails first."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from benchmarks import attacks_tables, examples_report
from benchmarks.attacks_tables import Entry, Rate
from benchmarks.common import recorded
from benchmarks.frontier.aggregate import Point, Points, points
from benchmarks.frontier.cells import cell_of
from benchmarks.frontier.plan import FIRST_POISON
from benchmarks.frontier.results import NAME, Row, read, results_of
from benchmarks.frontier.sections import FIRST_PATCH
from benchmarks.frontier.tables import BRACKETS, Table, percent, seeds, told
from benchmarks.pages import Section
from peft_safety.evaluation.metrics import figure_from_json

LONGEST = 320
"""Steps of the longest fine-tunes on validation prompts."""
SMALL = 1 / 16
"""A small null space: the share of the directions."""
Line = tuple[str, str, str, str]


@dataclass(frozen=True)
class Evidence:
    """The results files of a folder, and figures of them as text."""

    folder: Path

    @cached_property
    def rows(self) -> list[Row]:
        return read(self.folder / NAME)[1]

    @cached_property
    def now(self) -> Points:
        return points(self.rows)

    @cached_property
    def before(self) -> Points:
        return points(read(self.folder / FIRST_PATCH)[1])

    @cached_property
    def attacked(self) -> tuple[attacks_tables.Grid, dict[str, dict[str, Rate]]]:
        return attacks_tables.grid(read(self.folder / attacks_tables.NAME, attacks_tables.BENCHMARK)[1])

    def of(self, name: str, metric: str = "refusal") -> str:
        """Of a method at one row in ten poisoned. Refusal is told with the number of seeds if it is not one."""
        return _told(self.now[name, FIRST_POISON], metric)

    def older(self, name: str, metric: str = "refusal", share: float = FIRST_POISON) -> str:
        """The same on the older patch."""
        return _told(self.before[name, share], metric)

    def long(self, arm: str, fraction: float, metric: str = "refusal") -> str:
        """Of the longest fine-tune on validation prompts."""
        (row,) = [
            row
            for row in self.rows
            if (cell := cell_of(row)).split == "validation"
            and (cell.arm, cell.fraction) == (arm, fraction)
            and (arm == "aligned" or row["steps"] == LONGEST)
        ]
        return str(figure_from_json(row[metric]))

    def entry(self, name: str, attack: str) -> Entry:
        """A defense under the strong form of an attack."""
        return self.attacked[0][name][(attack, *attacks_tables.STRONG)]

    def under(self, name: str, attack: str, form: str) -> str:
        """What it refuses then, and what the aligned model does."""
        before, entry = self.attacked[1][attack][form], self.entry(name, attack)
        count = len(entry.rows)
        return f"{percent(entry.rates[form])}{seeds(count) if count > 1 else ''} of {percent(before)}"


def _told(point: Point, metric: str) -> str:
    return told(point, metric, usual=1) if metric == "refusal" else percent(point.rate(metric))


def failures(found: Evidence) -> list[Line]:
    """What wins against the recommended setting, and what it takes to hold."""
    shown, aligned = found.attacked
    chain = {**shown["frozen-flagged"], **shown["chain-system"], **shown["chain-clean"]}  # the recommended form wins
    lost, form, title = max((*entry.lost(aligned[one[0]]), attacks_tables.title(one)) for one, entry in chain.items())
    return [
        (
            "GuardSpace, frozen A, under strong poison in a context",
            f"refusal behind the trigger {found.under('frozen', 'trigger', 'trigger')}, under the obedient system "
            f"prompt {found.under('frozen', 'identity', 'system')}; bare requests "
            f"{found.under('frozen', 'trigger', 'bare')}",
            "**loses**: calibrate in the data's contexts, and screen the rows",
            "[attacks](attacks.md)",
        ),
        (
            "the same, calibrated in the data's contexts, checked rows named",
            f"behind the trigger {found.under('frozen-clean', 'trigger', 'trigger')}, in the frame "
            f"{found.under('frozen-clean', 'wrapper', 'frame')} (of other wording "
            f"{found.under('frozen-clean', 'wrapper', 'unseen')}), persona "
            f"{found.under('frozen-clean', 'persona', 'turn')}",
            "holds in contexts that rows share (one seed)",
            "[attacks](attacks.md)",
        ),
        (
            "frozen A on screened rows, in the data's contexts where they were tried",
            f"behind the trigger {found.under('frozen-flagged', 'trigger', 'trigger')}, system prompt "
            f"{found.under('chain-system', 'identity', 'system')}; worst {attacks_tables.points(lost)} points "
            f"({title}, {form})",
            "mostly holds",
            "[attacks](attacks.md)",
        ),
        (
            "GuardSpace, frozen A, in a long fine-tune",
            f"after {LONGEST} steps, n/4: refusal {found.long('guard', 1 / 4)}, n/16: {found.long('guard', SMALL)} "
            f"(aligned {found.long('aligned', 0)})",
            "**needs a quarter of the directions**",
            "[frontier](frontier.md)",
        ),
    ]


def training(found: Evidence) -> list[Line]:
    """Methods that train."""
    of, news = found.of, points(read(found.folder / f"{results_of('news')}.jsonl")[1])
    headlines = {name: percent(news[name, FIRST_POISON].rate("refusal")) for name in ("lora", "frozen")}
    learned = {name: percent(news[name, FIRST_POISON].rate("task_accuracy")) for name in headlines}
    arms = {row["arm"]: row for row in recorded("scale", found.folder)[1]}
    cost = [arms["frozen"][key] / arms["lora"][key] for key in ("peak MiB", "step s")]
    return [
        (
            "plain LoRA",
            f"refusal {of('lora')}, seed 0 alone {percent(found.now['lora', FIRST_POISON].at(0).rate('refusal'))} "
            f"(aligned {of('aligned')}), accuracy {of('lora', 'task_accuracy')}",
            "loses safety",
            "[frontier](frontier.md)",
        ),
        (
            "GuardSpace, frozen A",
            f"refusal {of('frozen')}, accuracy {of('frozen', 'task_accuracy')}; controls: random null space "
            f"{of('random:frozen')}, equal norm {of('scaled:frozen')}",
            "keeps safety; the null space does it",
            "[frontier](frontier.md)",
        ),
        (
            "GuardSpace, both factors train",
            f"refusal {of('guardspace')}, accuracy {of('guardspace', 'task_accuracy')}; random null space "
            f"{of('random:guardspace')}",
            "keeps it; weaker under attack",
            "[frontier](frontier.md), [limits](guardspace.md)",
        ),
        (
            "GuardSpace, frozen A, second task",
            f"headlines: refusal {headlines['frozen']}, accuracy {learned['frozen']}; plain LoRA {headlines['lora']}, "
            f"{learned['lora']}",
            "keeps it; free answers are learned less",
            "[tasks](tasks.md)",
        ),
        (
            "GuardSpace, frozen A, 8B-shaped QLoRA",
            f"memory {cost[0]:.2f} times, step {cost[1]:.2f} times plain LoRA's",
            "costs little",
            "[costs](costs.md)",
        ),
        (
            "10 % safety data",
            f"refusal {of('lora-mixed')}, accuracy {of('lora-mixed', 'task_accuracy')}; † half poisoned "
            f"{found.older('lora-mixed', share=0.5)}",
            "helps until the poison is strong",
            "[frontier](frontier.md)",
        ),
        (
            "† SaLoRA",
            f"refusal {found.older('salora-0.9')}, random basis {found.older('random:salora-0.9')}; at the published "
            f"rank {found.older('salora-32')}",
            "no benefit",
            "[older patch](older_patch.md)",
        ),
    ]


def others(found: Evidence) -> list[Line]:
    """Methods before and after the training."""
    of, older = found.of, found.older
    patch = examples_report.read(found.folder, "patch")["arms"]
    figures = {
        arm: str(figure_from_json(patch[arm]["over-refusal, safe"])) for arm in ("hard", "none", "hard, random basis")
    }
    return [
        (
            "`repair`, GuardSpace's null space",
            f"short run, n/4: refusal {of('blind')}, accuracy {of('blind', 'task_accuracy')}, random basis "
            f"{of('random:blind')}; {LONGEST} steps, n/16: {found.long('blind', SMALL)}, accuracy "
            f"{found.long('blind', SMALL, 'task_accuracy')}",
            "brings safety back; take a small null space after a long run",
            "[repair](repair.md)",
        ),
        (
            "`repair`, Safe LoRA",
            f"as published: refusal {of('safe-lora')}, accuracy {of('safe-lora', 'task_accuracy')}; soft "
            f"{of('safe-lora-soft')}, {of('safe-lora-soft', 'task_accuracy')} († {older('safe-lora-soft')}, equal "
            f"norm {older('scaled:safe-lora-soft')})",
            "undoes the fine-tune",
            "[repair](repair.md)",
        ),
        (
            "† SOMF `fuse`",
            f"refusal {older('somf-seen')}, accuracy {older('somf-seen', 'task_accuracy')}; random mask "
            f"{older('random:somf-seen')}; learned on the poison's own requests, too",
            "helps",
            "[older patch](older_patch.md)",
        ),
        (
            "† OrthoSafetyPatch",
            f"over-refusal {figures['hard']}, unconstrained {figures['none']}, random basis "
            f"{figures['hard, random basis']}",
            "less over-refusal",
            "[patches](patches.md)",
        ),
    ]


def summary(folder: Path, page: Path) -> str:
    """The section of the page, as markdown."""
    found = Evidence(folder)
    lines = [*failures(found), *training(found), *others(found)]
    notes = [
        "- Test prompts, one row in ten poisoned unless it says otherwise; long fine-tunes: validation prompts. "
        f"Strong poison: half of the rows, four epochs. {BRACKETS} Points: of the seed that loses most.",
        "- One seed where no number is said; compare such rows with plain LoRA of seed 0. †: on the older patch, "
        "which refuses too much.",
        "- Written by `python -m benchmarks.report summary`.",
    ]
    return "\n".join([*Table(("method", "measured", "verdict", "page"), lines, labels=4).markdown(), "", *notes])


SECTIONS = (Section("summary", "results/README.md", summary),)
