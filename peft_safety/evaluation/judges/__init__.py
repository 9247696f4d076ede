"""Judges of responses, one file a family: `judge(name)` makes one."""

from peft_safety.evaluation.judges.agreement import agreement, check_control
from peft_safety.evaluation.judges.base import Judge, Verdict, require_pairs, verdicts_of
from peft_safety.evaluation.judges.encoder import ClassifierJudge
from peft_safety.evaluation.judges.keyword import KeywordJudge
from peft_safety.evaluation.judges.registry import JUDGES, judge

__all__ = [
    "JUDGES",
    "ClassifierJudge",
    "Judge",
    "KeywordJudge",
    "Verdict",
    "agreement",
    "check_control",
    "judge",
    "require_pairs",
    "verdicts_of",
]
