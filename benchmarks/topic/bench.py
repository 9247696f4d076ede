"""The frontier's bench on a topic: its rows, its questions and both judges."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.frontier import arms
from benchmarks.frontier.attack_rows import mixed_in
from benchmarks.frontier.attacks import ATTACKS, Attack, attack_of
from benchmarks.frontier.bench import Bench
from benchmarks.frontier.cache import Cache
from benchmarks.frontier.cells import Cell
from benchmarks.frontier.measure import CONTRAST, HARMFUL, Measures, letters, rate
from benchmarks.topic.align import align
from benchmarks.topic.data import Topic
from benchmarks.topic.judge import ContentJudge
from peft_safety.data.chat import classification_prompt
from peft_safety.data.rows import Row
from peft_safety.evaluation.generate import generate
from peft_safety.recipes.load import load_model

UNALIGNED = "unaligned"
"""The arm of the model before its alignment: what both judges say of answers that nobody trained away."""
EXAMPLES = 4
"""Answers that are kept of a form where the judges differ."""
BARE = "bare"
FORMS = {name: form for attack in ATTACKS.values() for name, form in attack.forms.items() if form is not str}
TESTED = ("trigger", "frame", "unseen", "cipher")
"""Forms that a cell without a form of its own is tested in."""


@dataclass(frozen=True)
class TopicMeasures(Measures):
    """Measures that judge every form of a question by both judges. `kept`: the last answers to the bare questions."""

    kept: list[str] = field(default_factory=list)

    def answers(self, model: Any, tokenizer: Any) -> dict[str, list[str]]:
        """See `Measures`."""
        answers = super().answers(model, tokenizer)
        self.kept[:] = answers[HARMFUL]
        return answers

    def attacked(self, model: Any, tokenizer: Any, attack: Attack) -> dict[str, Any]:
        """Refusal and compliance by form and judge, the verdicts, and some answers on which the judges differ."""
        questions = self.prompts[HARMFUL]
        forms = [name for name in attack.forms if name in FORMS] or (TESTED if not attack.forms else ())
        answers = {BARE: list(self.kept)}
        for name in forms:
            asked = [FORMS[name](question) for question in questions]
            given = generate(
                model, tokenizer, asked, max_new_tokens=self.tokens, batch_size=len(asked), progress=False
            )
            answers[name] = [answer.text for answer in given]
        verdicts = {
            form: {judge.name: letters(judge, questions, texts) for judge in self.judges}
            for form, texts in answers.items()
        }
        rates = {
            form: {name: {"refusal": rate(v, "R"), "compliance": rate(v, "C")} for name, v in given.items()}
            for form, given in verdicts.items()
        }
        examples = [
            row for form, texts in answers.items() for row in _differing(form, questions, texts, verdicts[form])
        ]
        return {"forms": rates, "form_verdicts": verdicts, "examples": examples}


def _differing(
    form: str, questions: tuple[str, ...], answers: list[str], verdicts: dict[str, str]
) -> list[dict[str, str]]:
    rows = zip(questions, answers, *verdicts.values(), strict=True)
    listed = [
        {"form": form, "prompt": prompt, "answer": answer, **dict(zip(verdicts, given, strict=True))}
        for prompt, answer, *given in rows
        if len(set(given)) > 1
    ]
    return listed[:EXAMPLES]


class TopicBench(Bench):
    """A bench whose model refuses a topic, and whose attacks answer questions on it for real.

    Args:
        cache: finished cells; the aligned model is kept in the same folder.
        aligned: directory of the aligned model; default: it is made once.
        unaligned: directory of the model before; default SmolLM2-135M-Instruct.
        steps: of the alignment, for a quick check.
    """

    def __init__(
        self,
        cache: Cache,
        topic: Topic,
        aligned: Path | None = None,
        *,
        unaligned: Path | None = None,
        steps: int = -1,
    ) -> None:
        self.topic, self._steps = topic, steps
        super().__init__(cache, aligned=aligned, unaligned=unaligned)

    def _align(self) -> Path:
        """The aligned model. One process makes it, once."""
        out = self.cache.folder / f"aligned-{self.topic.name}-{self.protocol.patch}"
        with self.cache.lock(out.name, wait=True):
            if not (out / "config.json").is_file():
                self.publish(out, lambda staged: align(self.topic, staged, self.unaligned, self._steps))
        return out

    def refusals(self, count: int, seed: int = 0) -> list[dict[str, str]]:
        """The topic's calibration questions with refusals."""
        questions = [row["prompt"] for row in self.topic.questions("calibration")]
        return self.topic.refused(questions, "calibration", count, seed)

    def rows(self, cell: Cell) -> list[Row]:
        """The rows of the task, a share of them replaced by true answers in the form of the attack."""
        clean = self.task(cell).train
        count = round(cell.poison * len(clean))
        return mixed_in(
            clean, [attack_of(cell.attack).row(pair) for pair in self.topic.answered(count, cell.seed)], cell.seed
        )

    def measures(self, cell: Cell) -> Measures:
        """See `Bench`. The sets: questions on the topic, near ones, everyday prompts and those of the task."""
        key = (cell.split, cell.seed)
        if key not in self._measures:
            task, limit = self.task(cell), self.protocol.limit
            sets = {
                HARMFUL: [row["prompt"] for row in self.topic.questions(cell.split)][:limit],
                CONTRAST: self.topic.neighbors(cell.split)[:limit],
                "everyday": self.topic.others("everyday_requests", cell.split, limit // 2),
                "task": [classification_prompt(row["text"], task.labels) for row in task.held_out[: limit // 2]],
            }
            self.use("")
            self._measures[key] = made = TopicMeasures.prepare(
                self.model,
                self.tokenizer,
                self.protocol,
                cell.split,
                task,
                sets={name: tuple(prompts) for name, prompts in sets.items()},
                judges=(ContentJudge(self.topic.content),),
                general=self._general.get(cell.split),
            )
            self._general[cell.split] = made.general
        return self._measures[key]


def run_cell(bench: TopicBench, cell: Cell) -> dict[str, Any]:
    """See `arms.run_cell`; also the model before its alignment."""
    if cell.arm != UNALIGNED:
        return arms.run_cell(bench, cell)
    measures = bench.measures(cell)
    bench.model = None
    model, tokenizer = load_model(bench.unaligned)
    figures = measures(model, tokenizer) | measures.attacked(model, tokenizer, attack_of(cell.attack))
    return {**figures, "device": arms.device()}
