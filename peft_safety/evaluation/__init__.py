"""Measuring what fine-tuning did to safety and to the task."""

from peft_safety.evaluation.evaluate import Evaluation, evaluate, self_responses
from peft_safety.evaluation.judges import Judge, KeywordJudge, Verdict
from peft_safety.evaluation.metrics import Mean, Rate, wilson_interval
from peft_safety.evaluation.prompts import PromptSet, prompt_set

__all__ = [
    "Evaluation",
    "Judge",
    "KeywordJudge",
    "Mean",
    "PromptSet",
    "Rate",
    "Verdict",
    "evaluate",
    "prompt_set",
    "self_responses",
    "wilson_interval",
]
