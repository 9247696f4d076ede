"""Measuring what fine-tuning did to safety and to the task."""

from peft_safety.evaluation.evaluate import Evaluation, evaluate, self_responses
from peft_safety.evaluation.judges import Judge, KeywordJudge, Verdict
from peft_safety.evaluation.metrics import Mean, Rate, wilson_interval
from peft_safety.evaluation.prompts import PromptSet, prompt_set
from peft_safety.evaluation.sets import NamedSet, named_set

__all__ = [
    "Evaluation",
    "Judge",
    "KeywordJudge",
    "Mean",
    "NamedSet",
    "PromptSet",
    "Rate",
    "Verdict",
    "evaluate",
    "named_set",
    "prompt_set",
    "self_responses",
    "wilson_interval",
]
