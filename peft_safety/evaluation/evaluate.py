"""One evaluation: safety, over-refusal, task and drift, always side by side."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peft_safety.data.rows import Rows, as_rows, label_names
from peft_safety.evaluation.generate import BATCH_SIZE, generate
from peft_safety.evaluation.judges import Judge, KeywordJudge, Verdict, verdicts_of
from peft_safety.evaluation.metrics import Figure, Mean, Rate
from peft_safety.evaluation.prompts import PromptSet, prompt_set
from peft_safety.evaluation.tasks import is_classification, response_nll, task_answers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

METRICS = {
    "refusal": "refusal, harmful",
    "compliance": "compliance, harmful",
    "over_refusal": "over-refusal, safe",
    "everyday_refusal": "over-refusal, everyday",
    "task_refusal": "over-refusal, task",
    "task_accuracy": "task accuracy",
    "task_nll": "task NLL",
    "general_nll": "general NLL",
}
"""Field of `Evaluation` -> its heading in a report."""


@dataclass(frozen=True)
class Evaluation:
    """What was measured on one model: shares and means with their intervals. No response is kept.

    Attributes:
        split, judge: the split of the prompts, and the name of the judge.
        refusal, compliance: share of harmful requests that were refused (higher is safer), and whose response opens as
            an answer does.
        over_refusal, everyday_refusal: share of safe, dangerous-looking prompts and of everyday requests that were
            refused; lower is better.
        task_refusal, task_accuracy: for classification tasks, shares of prompts refused, and answered right.
        task_nll, general_nll: nats a token on other tasks, and on general data, for drift.
        undecided: verdicts that the judge did not reach; they count as neither refusal nor compliance in the shares
            above. Where there are any, `figures` has their share too.
        seconds: wall-clock time.
    """

    split: str
    judge: str
    refusal: Rate
    compliance: Rate
    over_refusal: Rate
    everyday_refusal: Rate | None = None
    task_refusal: Rate | None = None
    task_accuracy: Rate | None = None
    task_nll: Mean | None = None
    general_nll: Mean | None = None
    undecided: int = 0
    seconds: float = 0.0

    def figures(self) -> dict[str, Figure]:
        """Heading -> figure, for what was measured."""
        figures: dict[str, Figure | None] = {heading: getattr(self, field) for field, heading in METRICS.items()}
        if self.undecided:
            judged = (self.refusal, self.over_refusal, self.everyday_refusal, self.task_refusal)
            figures["undecided"] = Rate(self.undecided, sum(rate.n for rate in judged if rate is not None))
        return {heading: figure for heading, figure in figures.items() if figure is not None}

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, with N and a 95 % interval beside each."""
        figures = {field: getattr(self, field) for field in METRICS}
        plain = {field: None if figure is None else figure.to_json() for field, figure in figures.items()}
        rest = {"undecided": self.undecided, "seconds": round(self.seconds, 2)}
        return {"split": self.split, "judge": self.judge, **plain, **rest}


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompts: PromptSet | None = None,
    task: Rows = (),
    labels: Sequence[Any] | None = None,
    general: Rows = (),
    judge: Judge | None = None,
    max_new_tokens: int = 16,
    max_length: int = 512,
    batch_size: int = BATCH_SIZE,
    progress: bool = True,
) -> Evaluation:
    """Measure refusal, compliance, over-refusal, and (given rows) task quality and general drift.

    Args:
        prompts, judge: default the packaged test split, and `KeywordJudge`.
        task, labels: held-out rows, all {text, label} or all {prompt, response} / {messages}; every label of the task.
        general: {prompt, response} rows. `self_responses` of the model before fine-tuning gives them, and then their
            NLL measures drift.
        max_new_tokens: of each judged response; a keyword judge needs only its head.
        max_length: tokens kept of each task or general row.
    """
    started = time.perf_counter()
    prompts, judge = prompts or prompt_set(), judge or KeywordJudge()
    task, general = as_rows(task, "task rows"), as_rows(general, "general rows")
    classified = is_classification(task)
    names = list(labels if labels is not None else ()) or label_names(task)
    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    judged: dict[str, Any] = {"max_new_tokens": max_new_tokens, **options}

    harmful = _verdicts(model, tokenizer, prompts.harmful, judge, description="harmful prompts", **judged)
    contrast = _verdicts(model, tokenizer, prompts.contrast, judge, description="safe prompts", **judged)
    everyday = _verdicts(model, tokenizer, prompts.everyday, judge, description="everyday prompts", **judged)
    figures: dict[str, Any] = {}
    told: list[Verdict] = []
    if classified:
        answers = task_answers(model, tokenizer, task, names, least_tokens=max_new_tokens, **options)
        told = verdicts_of(judge, [answer.prompt for answer in answers], [answer.text for answer in answers])
        figures["task_refusal"] = _refused(told)
        figures["task_accuracy"] = Rate.of(answer.correct for answer in answers)
    options["max_length"] = max_length
    if task and not classified:
        figures["task_nll"] = response_nll(model, tokenizer, task, description="task", **options)
    if general:
        figures["general_nll"] = response_nll(model, tokenizer, general, description="general", **options)
    return Evaluation(
        prompts.split,
        judge.name,
        refusal=_refused(harmful),
        compliance=Rate.of(verdict is Verdict.COMPLIANCE for verdict in harmful),
        over_refusal=_refused(contrast),
        everyday_refusal=_refused(everyday) if everyday else None,
        **figures,
        undecided=[*harmful, *contrast, *everyday, *told].count(Verdict.UNDECIDED),
        seconds=time.perf_counter() - started,
    )


def refusal_rate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    judge: Judge,
    max_new_tokens: int = 16,
    **options: Any,
) -> Rate:
    """The share of `prompts` whose greedy answer the judge calls a refusal; the options are those of `generate`."""
    return _refused(_verdicts(model, tokenizer, prompts, judge, max_new_tokens=max_new_tokens, **options))


def _verdicts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], judge: Judge, **options: Any
) -> list[Verdict]:
    """The judge's verdicts on greedy answers; none without prompts."""
    if not prompts:
        return []
    return verdicts_of(judge, prompts, [answer.text for answer in generate(model, tokenizer, prompts, **options)])


def _refused(verdicts: Sequence[Verdict]) -> Rate:
    return Rate.of(verdict is Verdict.REFUSAL for verdict in verdicts)


def self_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 32,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """The model's own greedy answers, if any, as {prompt, response, truncated} rows: a reference for drift. What the
    chat template opens (`Generation.opened`) is no part of them.
    """
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "progress": progress}
    answers = generate(model, tokenizer, prompts, description="own answers", **options)
    return [
        {"prompt": prompt, "response": answer.written, "truncated": not answer.finished}
        for prompt, answer in zip(prompts, answers, strict=True)
        if answer.written
    ]
