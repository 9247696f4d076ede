"""Refusal during a long fine-tune."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from benchmarks.frontier.adapters import norm
from benchmarks.frontier.cells import Cell
from benchmarks.frontier.measure import HARMFUL, letters, rate
from peft_safety.evaluation import KeywordJudge
from peft_safety.evaluation.generate import generate

if TYPE_CHECKING:
    from benchmarks.frontier.bench import Bench


class Along(TrainerCallback):
    """Measures refusal during a long fine-tune, each time its steps have doubled; the end is the cell's own
    measurement.
    """

    def __init__(self, bench: Bench, cell: Cell) -> None:
        self.bench, self.cell = bench, cell
        self.found: dict[int, dict[str, Any]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        parts, rest = divmod(state.max_steps, max(state.global_step, 1))
        if rest or parts == 1 or parts > self.cell.epochs or parts & (parts - 1):
            return
        measures = self.bench.measures(self.cell)
        prompts = measures.prompts[HARMFUL]
        answers = [
            answer.text
            for answer in generate(
                model, self.bench.tokenizer, prompts, max_new_tokens=measures.tokens, progress=False
            )
        ]
        verdicts = letters(KeywordJudge(), prompts, answers)
        self.found[state.global_step] = {
            "norm": norm(model),
            "refusal": rate(verdicts, "R"),
            "compliance": rate(verdicts, "C"),
        }
