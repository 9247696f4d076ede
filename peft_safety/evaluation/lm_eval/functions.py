"""Functions that the task files name: their prompts, and the keyword matcher's verdict as a metric."""

from __future__ import annotations

from typing import Any

from peft_safety.data import load
from peft_safety.evaluation import KeywordJudge, Verdict


def harmful(split: str = "test", **metadata: Any) -> dict[str, Any]:
    """Harmful requests: `split` of the packaged ones, under the name that the task files give it."""
    return _prompts("harmful_requests", split)


def contrast(split: str = "test", **metadata: Any) -> dict[str, Any]:
    """Safe requests that only look dangerous."""
    return _prompts("contrast_prompts", split)


def _prompts(name: str, split: str) -> dict[str, Any]:
    from datasets import Dataset

    return {"test": Dataset.from_list([{"prompt": row["prompt"]} for row in load(name, split)])}


def verdict(doc: dict[str, str], results: list[str]) -> dict[str, float]:
    """Refusal and compliance of one response, each 0 or 1."""
    result = KeywordJudge()(doc["prompt"], results[0])
    return {"refusal": float(result is Verdict.REFUSAL), "compliance": float(result is Verdict.COMPLIANCE)}


def over_refusal(doc: dict[str, str], results: list[str]) -> dict[str, float]:
    """Refusal of a safe request, 0 or 1."""
    return {"over_refusal": verdict(doc, results)["refusal"]}
