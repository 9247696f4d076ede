"""A base model and what was made of it, on the same prompts: the work of `peft-safety evaluate`."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from peft_safety.core.environment import environment
from peft_safety.core.names import public_name
from peft_safety.core.plain_lora import MANIFEST
from peft_safety.errors import ArtifactError, ConfigError
from peft_safety.evaluation import asking as ask
from peft_safety.evaluation.asking import Asking, Judged
from peft_safety.evaluation.generate import generate
from peft_safety.evaluation.judges import Judge, Verdict
from peft_safety.evaluation.judges.agreement import agreement
from peft_safety.evaluation.judges.endpoint import Endpoint
from peft_safety.evaluation.metrics import Figure, Paired, Rate
from peft_safety.evaluation.sets import NamedSet
from peft_safety.evaluation.tasks import exact_answers, response_nll
from peft_safety.recipes.load import load_adapter, load_model
from peft_safety.reporting.report import Report

BASE = "base"
HEADINGS = {"refusal": "refusal", "compliance": "compliance", "over_refusal": "over-refusal"}


class Arm(Protocol):
    """A model that answers."""

    tokenizer: Any

    def respond(self, prompts: Sequence[ask.Prompt], seed: int) -> list[str]:
        """One answer a prompt."""
        ...

    def task(self, part: NamedSet) -> dict[str, Any]:
        """`{"accuracy": outcomes}` of labeled rows, or `{"nll": Mean}` of others."""
        ...


@dataclass
class Local:
    """A model in this process."""

    model: Any
    tokenizer: Any
    asking: Asking
    batch_size: int
    progress: bool

    def respond(self, prompts: Sequence[ask.Prompt], seed: int) -> list[str]:
        options: dict[str, Any] = {"batch_size": self.batch_size, "progress": self.progress, "seed": seed}
        options |= {"max_new_tokens": self.asking.max_new_tokens, "temperature": self.asking.temperature}
        return [answer.text for answer in generate(self.model, self.tokenizer, prompts, **options)]

    def task(self, part: NamedSet) -> dict[str, Any]:
        options: dict[str, Any] = {"batch_size": self.batch_size, "progress": self.progress}
        if part.labels:
            return {"accuracy": exact_answers(self.model, self.tokenizer, part.rows, part.labels, **options)}
        return {"nll": response_nll(self.model, self.tokenizer, part.rows, **options)}


@dataclass
class Served:
    """A model behind an OpenAI-compatible endpoint."""

    endpoint: Endpoint
    asking: Asking
    tokenizer: Any = None

    def respond(self, prompts: Sequence[ask.Prompt], seed: int) -> list[str]:
        turns = [[{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt for prompt in prompts]
        options = {"max_tokens": self.asking.max_new_tokens, "temperature": self.asking.temperature}
        given = dict(self.endpoint.ask_each(turns, seed=seed, **options))
        return [given[number] for number in range(len(turns))]

    def task(self, part: NamedSet) -> dict[str, Any]:
        raise ConfigError("utility sets need the model's weights. Leave them out, or leave out --url.")


@dataclass
class Measured:
    """What was measured on one arm: figures by heading, outcomes behind the rates, and figures by a gate's names."""

    figures: dict[str, Figure] = field(default_factory=dict)
    outcomes: dict[str, list[bool]] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)
    undecided: dict[str, int] = field(default_factory=dict)
    agreement: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        return {"values": self.values, "undecided": self.undecided, "agreement": self.agreement}


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
    baseline: Report | None = None,
    responses: Path | None = None,
) -> Comparison:
    """Ask every arm the same prompts, and judge the answers by every judge. Arms are made one after the other.

    Args:
        arms: names and models; the first is the reference, unless a baseline is given.
        judges: the first one's figures are those of a gate.
        baseline: an earlier report of the same protocol, whose first arm is the reference.
        responses: a new file, readable by its owner only, for the answers, which are kept nowhere else.

    Raises:
        ConfigError: a baseline of another protocol, or two sets of one name.
        ArtifactError: the file of responses exists.
    """
    if twice := [name for name, count in Counter(part.name for part in sets).items() if count > 1]:
        raise ConfigError(f"two sets have the name {twice[0]!r}. Rename a file, or give the set once.")
    protocol = protocol_of(sets, judges, asking)
    measured: dict[str, Measured] = {}
    figures: dict[str, Mapping[str, Figure]] = {}
    values: dict[str, dict[str, float]] = {}
    if baseline is not None:
        figures[BASE], values[BASE] = _from_baseline(baseline, protocol)
    for name, arm in arms:
        measured[name] = result = _measure(name, arm, sets, judges, asking, responses)
        figures[name], values[name] = result.figures, result.values
    reference = measured.get(BASE)
    changes = {} if reference is None else {n: _changes(reference, m) for n, m in measured.items() if n != BASE}
    details = {"protocol": protocol, "arms": {n: m.to_json() for n, m in measured.items()}, "changes": changes}
    details["values"] = values
    title = "Evaluation: " + ", ".join(dict.fromkeys(part.name for part in sets))
    notes = (*_notes(measured, judges, asking), *_said(changes))
    return Comparison(Report(title, figures, notes, environment(asking.seed), details), values)


def metric_names(sets: Sequence[NamedSet], asking: Asking) -> set[str]:
    """The figures that a gate may name."""
    variants = ["", *(name for name in ask.VARIANTS if name and getattr(asking, ask.OPTIONS[name]))]
    asked = [f"_{variant}" if variant else "" for variant in variants]
    names = set()
    for part in sets:
        if part.kind == "utility":
            metrics = ["accuracy"] if part.labels else []
            names.add(f"{'accuracy' if part.labels else 'nll'}:{part.name}")
        else:
            kinds = ("refusal", "compliance") if part.kind == "harmful" else ("over_refusal",)
            metrics = [metric + variant for metric in kinds for variant in asked]
        names |= {name for metric in metrics for name in (metric, f"{metric}:{part.name}")}
    return names


def protocol_of(sets: Sequence[NamedSet], judges: Sequence[Judge], asking: Asking) -> dict[str, Any]:
    """What must be equal for figures to be compared."""
    return {
        "sets": {part.name: {"kind": part.kind, "n": len(part.prompts), "sha256": part.sha256} for part in sets},
        "judges": [judge.name for judge in judges],
        **asking.to_json(),
    }


def local_arms(
    model: str, others: Sequence[str], asking: Asking, *, load_in_4bit: bool, with_base: bool, **options: Any
) -> Iterator[tuple[str, Arm]]:
    """The base model, then each adapter on it, or other model, in its place; one after the other in memory."""
    base, tokenizer = load_model(model, load_in_4bit=load_in_4bit)
    if with_base:
        yield BASE, Local(base, tokenizer, asking, **options)
    for path, name in zip(others, _names(others), strict=True):
        if (Path(path) / MANIFEST).is_file():
            adapted, _ = load_adapter(path, base)
            yield name, Local(adapted, tokenizer, asking, **options)
            base = adapted.unload()
        else:
            whole, own = load_model(path, load_in_4bit=load_in_4bit)
            yield name, Local(whole, own, asking, **options)


def served_arms(
    url: str, model: str, others: Sequence[str], asking: Asking, *, with_base: bool
) -> Iterator[tuple[str, Arm]]:
    """The same of models that a server has under these names."""
    names = [*([(BASE, model)] if with_base else []), *zip(_names(others), others, strict=True)]
    for name, served in names:
        yield name, Served(Endpoint(url, served), asking)


def _names(paths: Sequence[str]) -> list[str]:
    names = [public_name(path) for path in paths]
    return [f"{name} ({i})" if names.count(name) > 1 or name == BASE else name for i, name in enumerate(names, 1)]


def _measure(
    name: str, arm: Arm, sets: Sequence[NamedSet], judges: Sequence[Judge], asking: Asking, responses: Path | None
) -> Measured:
    result = Measured()
    pools: dict[str, list[bool]] = {}
    said: dict[str, list[Verdict]] = {judge.name: [] for judge in judges}
    for part in sets:
        if part.kind == "utility":
            _task(part, arm, result, pools)
            continue
        for variant, forms in asking.forms(part.prompts, arm.tokenizer).items():
            given = ask.answers(arm.respond, part.prompts, forms, asking)
            if responses is not None:
                _keep(responses, name, part.name, variant, given)
            for judge in judges:
                judged = given.judged(judge)
                said[judge.name] += judged.flat()
                _add(part, variant, judge, judge is judges[0], judged, result, pools)
    result.values |= {metric: Rate.of(outcomes).value for metric, outcomes in pools.items()}
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
            full = f"{metric}_{variant}" if variant else metric
            pools.setdefault(full, []).extend(outcomes)
            result.values[f"{full}:{part.name}"] = Rate.of(outcomes).value


def _task(part: NamedSet, arm: Arm, result: Measured, pools: dict[str, list[bool]]) -> None:
    for metric, figure in arm.task(part).items():
        if metric == "accuracy":
            heading = f"accuracy, {part.name}"
            result.outcomes[heading] = figure
            result.figures[heading] = Rate.of(figure)
            pools.setdefault("accuracy", []).extend(figure)
        else:
            result.figures[f"NLL, {part.name}"] = figure
        result.values[f"{metric}:{part.name}"] = Rate.of(figure).value if metric == "accuracy" else figure.value


def _keep(path: Path, arm: str, part: str, variant: str, given: ask.Answers) -> None:
    """Append answers to a file that only its owner can read."""
    opener = partial(os.open, mode=0o600)
    with open(path, "a", encoding="utf-8", opener=lambda file, flags: opener(file, flags | os.O_NOFOLLOW)) as file:
        for prompt, texts in zip(given.prompts, given.texts, strict=True):
            row = {"arm": arm, "set": part, "asked": variant or "bare", "prompt": prompt, "responses": texts}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def check_new(path: Path) -> None:
    """Refuse a file of responses that is there: it may be readable by others, or hold another run's."""
    if os.path.lexists(path):
        raise ArtifactError(f"{path} exists. Give --keep-responses a new file.")


def _from_baseline(report: Report, protocol: dict[str, Any]) -> tuple[Mapping[str, Figure], dict[str, float]]:
    name = next(iter(report.arms))
    stored, values = report.details.get("protocol"), (report.details.get("values") or {}).get(name)
    now = json.loads(json.dumps(protocol))
    if not isinstance(stored, dict) or values is None:
        raise ConfigError("the baseline is no report of `peft-safety evaluate`. Give the report.json that it wrote.")
    differing = [key for key in now if stored.get(key) != now[key]]
    if differing:
        pairs = "; ".join(f"{key} {stored.get(key)!r}, now {now[key]!r}" for key in differing[:2])
        raise ConfigError(f"the baseline was measured otherwise: {pairs[:400]}. Measure it again.")
    return report.arms[name], dict(values)


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
        for judge, count in result.undecided.items():
            if count:
                yield f"{name}: {judge} left {count} answers undecided; they count as neither."
        if result.agreement is not None and result.agreement["n"]:
            kappa = result.agreement["kappa"]
            shown = "undefined" if kappa is None else f"{kappa:.2f}"
            share = f"{100 * result.agreement['share']:.0f} % of {result.agreement['n']} answers"
            yield f"{name}: {judges[0].name} and {judges[1].name} agree on {share} (Cohen's kappa {shown})."
