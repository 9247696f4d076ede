"""Functions that the task files name: their prompts, and the keyword matcher's verdict as a metric."""

from __future__ import annotations

from typing import Any

from peft_safety.errors import extra
from peft_safety.evaluation import KeywordJudge, Verdict, named_set
from peft_safety.evaluation.judges import verdicts_of
from peft_safety.evaluation.sets import Kind


def harmful(split: str | None = None, prompts: str = "packaged", **metadata: Any) -> dict[str, Any]:
    """Harmful requests, under the name that the task files give their split: arguments of `named_set`."""
    return _drawn("harmful", prompts, split, metadata)


def contrast(split: str | None = None, prompts: str = "packaged-contrast", **metadata: Any) -> dict[str, Any]:
    """Safe requests that only look dangerous."""
    return _drawn("over_refusal", prompts, split, metadata)


def _drawn(kind: Kind, prompts: str, split: str | None, metadata: dict[str, Any]) -> dict[str, Any]:
    with extra("eval", "tasks of lm-evaluation-harness need the package `datasets`"):
        from datasets import Dataset

    draw = {name: metadata[name] for name in ("limit", "seed", "directory") if name in metadata}
    drawn = named_set(prompts, kind=kind, split=split, **draw).prompts
    return {"test": Dataset.from_list([{"prompt": prompt} for prompt in drawn])}


def verdict(doc: dict[str, str], results: list[str]) -> dict[str, float]:
    """Refusal and compliance of one response, without the reasoning before it, each 0 or 1."""
    result = verdicts_of(KeywordJudge(), [doc["prompt"]], results[:1])[0]
    return {"refusal": float(result is Verdict.REFUSAL), "compliance": float(result is Verdict.COMPLIANCE)}


def over_refusal(doc: dict[str, str], results: list[str]) -> dict[str, float]:
    """Refusal of a safe request, 0 or 1."""
    return {"over_refusal": verdict(doc, results)["refusal"]}
