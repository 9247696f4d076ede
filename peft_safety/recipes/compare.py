"""A base model and what was made of it, on the same prompts: the work of `peft-safety evaluate`."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from peft_safety.core.checks import is_number
from peft_safety.core.environment import environment
from peft_safety.errors import ArtifactError, ConfigError
from peft_safety.evaluation import asking as ask
from peft_safety.evaluation.asking import Asking, Judged
from peft_safety.evaluation.judges import Judge, Verdict
from peft_safety.evaluation.judges.agreement import agreement
from peft_safety.evaluation.metrics import Figure, Paired, Rate
from peft_safety.evaluation.sets import NamedSet
from peft_safety.recipes.arms import BASE, Arm
from peft_safety.reporting.report import Report

UNDECIDED = "undecided"
"""The share of answers that are empty, or that the first judge left undecided: other figures count them as neither.
A gate's figure is the largest of any set, asked in one way.
"""
HEADINGS = {"refusal": "refusal", "compliance": "compliance", "over_refusal": "over-refusal"}


@dataclass
class Measured:
    """What was measured on one arm: figures by heading, outcomes behind the rates, and figures by a gate's names."""

    figures: dict[str, Figure] = field(default_factory=dict)
    outcomes: dict[str, list[bool]] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)
    undecided: dict[str, int] = field(default_factory=dict)
    unclear: float = 0.0
    empty: int = 0
    agreement: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        counts = {"undecided": self.undecided, "empty": self.empty, "undecided_or_empty": self.unclear}
        return {"values": self.values, **counts, "agreement": self.agreement}


@dataclass(frozen=True)
class Comparison:
    """The report, and each arm's figures by the names that a gate uses."""

    report: Report
    values: dict[str, dict[str, float]]


def compare(
    arms: Iterator[tuple[str, Arm]],
    sets: Sequence[NamedSet],
    judges: Sequence[Judge],
    asking: Asking,
    *,
    loaded: Mapping[str, Any] | None = None,
    baseline: Report | None = None,
    responses: Path | None = None,
) -> Comparison:
    """Ask every arm the same prompts, and judge the answers by every judge. Arms are made one after the other.

    Args:
        arms: names and models; the first is the reference, unless a baseline is given.
        judges: the first one's figures are those of a gate.
        loaded: which base model, and how; a baseline must be of the same.
        baseline: an earlier report of the same protocol, whose first arm is the reference.
        responses: a new file, readable by its owner only, for the answers, which are kept nowhere else.

    Raises:
        ConfigError: a baseline of another protocol; two sets, or judges, of one name; no arm.
        ArtifactError: the file of responses exists, or cannot be written.
    """
    for what, names in {"sets": [part.name for part in sets], "judges": [judge.name for judge in judges]}.items():
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise ConfigError(f"two {what} are called {twice[0]!r}, so their figures would be mixed. Rename one.")
    protocol = {**protocol_of(sets, judges, asking), **(loaded or {})}
    measured: dict[str, Measured] = {}
    figures: dict[str, Mapping[str, Figure]] = {}
    values: dict[str, dict[str, float]] = {}
    if baseline is not None:
        figures[BASE], values[BASE] = _from_baseline(baseline, protocol)
    with _new_file(responses) as file:
        for name, arm in arms:
            measured[name] = result = _measure(name, arm, sets, judges, asking, file)
            figures[name], values[name] = result.figures, result.values
    if not measured:
        raise ConfigError("nothing was measured. Give an adapter to compare with the baseline.")
    reference = measured.get(BASE)
    changes = {} if reference is None else {n: _changes(reference, m) for n, m in measured.items() if n != BASE}
    details = {"protocol": protocol, "arms": {n: m.to_json() for n, m in measured.items()}, "changes": changes}
    details["values"] = values
    title = "Evaluation: " + ", ".join(dict.fromkeys(part.name for part in sets))
    notes = (*_notes(measured, judges, asking), *_said(changes))
    return Comparison(Report(title, figures, notes, environment(asking.seed), details), values)


def metric_names(sets: Sequence[NamedSet], asking: Asking) -> set[str]:
    """The figures that a gate may name."""
    names = set()
    for part in sets:
        if part.kind == "utility":
            metrics = ["accuracy"] if part.labels else []
            names.add(f"{'accuracy' if part.labels else 'nll'}:{part.name}")
        else:
            kinds = ask.outcomes(part.kind, Judged([]))
            metrics = [ask.metric_name(metric, variant) for metric in kinds for variant in asking.variants()]
            names.add(UNDECIDED)
        names |= {name for metric in metrics for name in (metric, f"{metric}:{part.name}")}
    return names


def protocol_of(sets: Sequence[NamedSet], judges: Sequence[Judge], asking: Asking) -> dict[str, Any]:
    """What must be equal for figures to be compared."""
    return {
        "sets": {part.name: {"kind": part.kind, "n": len(part.prompts), "sha256": part.sha256} for part in sets},
        "judges": {judge.name: getattr(judge, "version", "") for judge in judges},
        **asking.to_json(),
    }


def _measure(
    name: str, arm: Arm, sets: Sequence[NamedSet], judges: Sequence[Judge], asking: Asking, kept: TextIO | None
) -> Measured:
    result = Measured()
    unclear: list[list[bool]] = []
    pools: dict[str, list[bool]] = {}
    said: dict[str, list[Verdict]] = {judge.name: [] for judge in judges}
    for part in sets:
        if part.kind == "utility":
            _task(part, arm, result, pools)
            continue
        for variant, forms in asking.forms(part.prompts, arm.tokenizer).items():
            given = ask.answers(arm.respond, part.prompts, forms, asking)
            if kept is not None:
                _keep(kept, name, part.name, variant, given)
            empty = [not text.strip() for text in given.flat()]
            result.empty += sum(empty)
            for judge in judges:
                judged, first = given.judged(judge), judge is judges[0]
                verdicts = judged.flat()
                said[judge.name] += verdicts
                if first:
                    pairs = zip(empty, verdicts, strict=True)
                    unclear.append([blank or verdict is Verdict.UNDECIDED for blank, verdict in pairs])
                _add(part, variant, judge, first, judged, result, pools)
    result.values |= {metric: Rate.of(outcomes).value for metric, outcomes in pools.items()}
    if unclear:
        result.values[UNDECIDED] = max(Rate.of(part).value for part in unclear)
        result.unclear = Rate.of(chain.from_iterable(unclear)).value
    result.undecided = {judge: verdicts.count(Verdict.UNDECIDED) for judge, verdicts in said.items()}
    if len(judges) > 1:
        result.agreement = agreement(said[judges[0].name], said[judges[1].name])
    return result


def _add(
    part: NamedSet,
    variant: str,
    judge: Judge,
    first: bool,
    judged: Judged,
    result: Measured,
    pools: dict[str, list[bool]],
) -> None:
    """The outcomes of one set, asked in one way, in the eyes of one judge."""
    for metric, outcomes in ask.outcomes(part.kind, judged).items():
        words = [HEADINGS[metric], part.name, ask.VARIANTS[variant], "" if first else f"by {judge.name}"]
        heading = ", ".join(filter(None, words))
        result.figures[heading], result.outcomes[heading] = Rate.of(outcomes), outcomes
        if first:
            full = ask.metric_name(metric, variant)
            pools.setdefault(full, []).extend(outcomes)
            result.values[f"{full}:{part.name}"] = Rate.of(outcomes).value


def _task(part: NamedSet, arm: Arm, result: Measured, pools: dict[str, list[bool]]) -> None:
    for metric, measured in arm.task(part).items():
        figure, heading = measured, f"NLL, {part.name}"
        if metric == "accuracy":
            figure, heading = Rate.of(measured), f"accuracy, {part.name}"
            result.outcomes[heading] = measured
            pools.setdefault("accuracy", []).extend(measured)
        result.figures[heading] = figure
        result.values[f"{metric}:{part.name}"] = figure.value


def _keep(file: TextIO, arm: str, part: str, variant: str, given: ask.Answers) -> None:
    try:
        for prompt, texts in zip(given.prompts, given.texts, strict=True):
            row = {"arm": arm, "set": part, "asked": variant or "bare", "prompt": prompt, "responses": texts}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()
    except OSError as error:
        raise ArtifactError(
            f"the answers cannot be kept: {error}. Make room for them, and give a new file."
        ) from error


@contextmanager
def _new_file(path: Path | None) -> Iterator[TextIO | None]:
    """A file that only its owner can read, and that was not there before. It has its name when the block is done."""
    if path is None:
        yield None
        return
    check_new(path)
    part = path.with_name(f"{path.name}.part")
    try:
        part.unlink(missing_ok=True)  # of a run that was stopped
        opener = partial(os.open, mode=0o600)
        file = open(part, "x", encoding="utf-8", errors="backslashreplace", opener=opener)  # noqa: SIM115
    except OSError as error:
        raise ArtifactError(f"{part} cannot be written: {error}. Give --keep-responses a new file.") from error
    try:
        yield file
    finally:
        with suppress(OSError):  # what a full disk refused before, it refuses again
            file.close()
        if part.stat().st_size == 0:
            part.unlink()
    if part.exists():
        part.rename(path)


def check_new(path: Path) -> None:
    """Refuse a file of responses that is there: it may be readable by others, or hold another run's."""
    if os.path.lexists(path):
        raise ArtifactError(f"{path} exists. Give --keep-responses a new file.")
    if not os.access(path.absolute().parent, os.W_OK):
        raise ArtifactError(f"{path.parent} is no directory that can be written. Give --keep-responses another file.")


def _from_baseline(report: Report, protocol: dict[str, Any]) -> tuple[Mapping[str, Figure], dict[str, float]]:
    name = next(iter(report.arms))
    stored, values = report.details.get("protocol"), report.details.get("values")
    own = values.get(name) if isinstance(values, dict) else None
    now = json.loads(json.dumps(protocol))
    numbers = isinstance(own, dict) and all(is_number(value) for value in own.values())
    if not isinstance(stored, dict) or not isinstance(own, dict) or not numbers:
        raise ConfigError("the baseline is no report of `peft-safety evaluate`. Give the report.json that it wrote.")
    differing = [key for key in now if stored.get(key) != now[key]]
    if differing:
        pairs = "; ".join(f"{key} {stored.get(key)!r}, now {now[key]!r}" for key in differing[:2])
        raise ConfigError(f"the baseline was measured otherwise: {pairs[:400]}. Measure it again.")
    return report.arms[name], own


def _changes(reference: Measured, other: Measured) -> dict[str, dict[str, Any]]:
    """By heading: prompts on which only the base, or only the arm, has the outcome, and McNemar's exact p."""
    changes = {}
    for heading, outcomes in other.outcomes.items():
        pair = Paired.of(reference.outcomes[heading], outcomes)
        changes[heading] = {"only_base": pair.only_first, "only_arm": pair.only_second, "n": pair.n, "p": pair.p_value}
    return changes


def _said(changes: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Iterator[str]:
    """A sentence for each change that is unlikely to be chance."""
    for arm, of_arm in changes.items():
        for heading, pair in of_arm.items():
            if pair["p"] < 0.05:
                counts = f"{pair['only_base']} prompts lost it and {pair['only_arm']} gained it"
                yield f"{arm}, {heading}: {counts} (McNemar's exact p = {pair['p']:.2g})."


def _notes(measured: Mapping[str, Measured], judges: Sequence[Judge], asking: Asking) -> Iterator[str]:
    yield from (f"Judge: {judge.name}. {judge.caveat}" for judge in judges)
    if asking.samples > 1 or asking.contexts > 1:
        yield "Of several answers to a prompt the worst counts."
    for name, result in measured.items():
        if result.empty:
            yield f"{name}: {result.empty} answers are empty, or reasoning that was cut off; they count as neither."
        for judge, count in result.undecided.items():
            if count:
                yield f"{name}: {judge} left {count} answers undecided; they count as neither."
        if result.agreement is not None and result.agreement["n"]:
            kappa = result.agreement["kappa"]
            shown = "undefined" if kappa is None else f"{kappa:.2f}"
            share = f"{100 * result.agreement['share']:.0f} % of {result.agreement['n']} answers"
            yield f"{name}: {judges[0].name} and {judges[1].name} agree on {share} (Cohen's kappa {shown})."
