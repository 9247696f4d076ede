"""Refusal during a long fine-tune."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from benchmarks.frontier.adapters import norm
from benchmarks.frontier.measure import HARMFUL, Measures, letters, rate
from peft_safety.evaluation import KeywordJudge
from peft_safety.evaluation.generate import generate


class Along(TrainerCallback):
    """Measures refusal in a fine-tune of several epochs, each time that the number of steps has doubled.

    The last step is left out: the cell's own measurement follows it.
    """

    def __init__(self, measures: Measures, tokenizer: Any, epochs: int) -> None:
        self.measures, self.tokenizer, self.epochs = measures, tokenizer, epochs
        self.results: dict[int, dict[str, Any]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        parts, rest = divmod(state.max_steps, max(state.global_step, 1))
        if rest or parts == 1 or parts > self.epochs or parts & (parts - 1):
            return
        prompts, tokens = self.measures.prompts[HARMFUL], self.measures.tokens
        answers = generate(model, self.tokenizer, prompts, max_new_tokens=tokens, progress=False)
        verdicts = letters(KeywordJudge(), prompts, [answer.text for answer in answers])
        self.results[state.global_step] = {
            "norm": norm(model),
            "refusal": rate(verdicts, "R"),
            "compliance": rate(verdicts, "C"),
        }
