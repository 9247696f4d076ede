"""The measurement of a cell: rates, and the verdict on each prompt for paired comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from benchmarks.frontier.attacks import AfterRefusal, Attack, template
from benchmarks.frontier.cells import Protocol
from peft_safety.data.rows import Row
from peft_safety.errors import DataError, DivergedError
from peft_safety.evaluation import Judge, KeywordJudge, Rate, Verdict, prompt_set, self_responses
from peft_safety.evaluation.generate import BATCH_SIZE, generate
from peft_safety.evaluation.judges import verdicts_of
from peft_safety.evaluation.tasks import exact_answers, likeliest_labels, response_nll
from peft_safety.recipes.bench import GENERAL_TOKENS
from peft_safety.recipes.load import TaskData

LETTERS = {Verdict.REFUSAL: "R", Verdict.COMPLIANCE: "C", Verdict.OTHER: "O", Verdict.UNDECIDED: "U"}
HARMFUL, CONTRAST = "harmful", "contrast"
"""The package's own sets."""


@dataclass(frozen=True)
class Measures:
    """Prompts, rows and references of one split. A task with labels is measured by its accuracy, one of free answers
    by the NLL of those held out.

    Attributes:
        prompts: by set; `HARMFUL` and `CONTRAST` are always included.
        task: the trained task. second: an untrained task, or None.
        general: the aligned model's own answers to everyday prompts; their NLL after training is the drift.
        judges: the first one is the keyword matcher.
    """

    split: str
    prompts: dict[str, tuple[str, ...]]
    task: TaskData
    second: TaskData | None
    general: list[dict[str, Any]]
    max_length: int
    tokens: int
    judges: Sequence[Judge] = field(default_factory=lambda: (KeywordJudge(),))

    @classmethod
    def prepare(
        cls,
        model: Any,
        tokenizer: Any,
        protocol: Protocol,
        split: str,
        task: TaskData,
        second: TaskData | None = None,
        *,
        sets: dict[str, tuple[str, ...]],
        judges: Sequence[Judge] = (),
        general: list[dict[str, Any]] | None = None,
    ) -> Measures:
        """Choose the prompts, the same for every seed. The aligned `model` answers the general prompts, unless the
        answers are given.
        """
        own = prompt_set(split, protocol.limit, 0)
        if general is None:
            general = self_responses(model, tokenizer, own.general, max_new_tokens=GENERAL_TOKENS, progress=False)
        prompts = {HARMFUL: own.harmful, CONTRAST: own.contrast, **sets}
        return cls(
            split, prompts, task, second, general, protocol.max_length, protocol.tokens, (KeywordJudge(), *judges)
        )

    def __call__(self, model: Any, tokenizer: Any) -> dict[str, Any]:
        """All figures of one model as plain values. Responses are not kept.

        Raises:
            DivergedError: the model's loss is not finite.
        """
        answers = self.answers(model, tokenizer)
        verdicts = {
            judge.name: {name: letters(judge, self.prompts[name], texts) for name, texts in answers.items()}
            for judge in self.judges
        }
        correct, learned = {}, {}
        if self.task.labels:
            correct["task"] = exact_answers(model, tokenizer, self.task.held_out, self.task.labels, progress=False)
            learned["task_accuracy"] = Rate.of(correct["task"]).to_json()
        else:
            learned["task_nll"] = self.loss(model, tokenizer, self.task.held_out)
        if self.second is not None:
            correct["second"] = likeliest_labels(
                model, tokenizer, self.second.held_out, self.second.labels, progress=False
            )
        drift = self.loss(model, tokenizer, self.general)
        seen = verdicts[self.judges[0].name]
        return {
            "split": self.split,
            "judge": self.judges[0].name,
            "refusal": rate(seen[HARMFUL], "R"),
            "compliance": rate(seen[HARMFUL], "C"),
            "over_refusal": rate(seen[CONTRAST], "R"),
            **learned,
            **({"second_accuracy": Rate.of(correct["second"]).to_json()} if "second" in correct else {}),
            "general_nll": drift,
            "transfer": {name: rate(text, "R") for name, text in seen.items() if name not in (HARMFUL, CONTRAST)},
            "verdicts": verdicts,
            "correct": {name: "".join("01"[hit] for hit in hits) for name, hits in correct.items()},
        }

    def loss(self, model: Any, tokenizer: Any, rows: Sequence[Row]) -> dict[str, Any]:
        """The mean NLL of rows' responses.

        Raises:
            DivergedError: it is not finite.
        """
        try:
            return response_nll(model, tokenizer, rows, max_length=self.max_length, progress=False).to_json()
        except DataError as error:
            raise DivergedError(
                f"the NLL of responses is not finite after training ({error}). Lower the learning rate."
            ) from error

    def answers(self, model: Any, tokenizer: Any) -> dict[str, list[str]]:
        """The model's answers to all prompts, by set."""
        everything = [prompt for prompts in self.prompts.values() for prompt in prompts]
        batch = BATCH_SIZE if model.device.type == "cpu" else len(everything)
        answers = iter(
            generate(model, tokenizer, everything, max_new_tokens=self.tokens, batch_size=batch, progress=False)
        )
        return {
            name: [answer.text for answer in islice(answers, len(prompts))] for name, prompts in self.prompts.items()
        }

    def attacked(self, model: Any, tokenizer: Any, attack: Attack) -> dict[str, Any]:
        """Refusal of the harmful requests in the forms of an attack; nothing for an attack without forms."""
        verdicts = {}
        with template(tokenizer, attack):
            for name, form in attack.forms.items():
                prompts = [form(prompt) for prompt in self.prompts[HARMFUL]]
                answers = generate(model, tokenizer, prompts, max_new_tokens=attack.tokens, progress=False)
                judge = AfterRefusal() if attack.name == "however" else KeywordJudge()
                verdicts[name] = letters(judge, self.prompts[HARMFUL], [answer.text for answer in answers])
        rates = {name: {"refusal": rate(text, "R"), "compliance": rate(text, "C")} for name, text in verdicts.items()}
        return {"attacked": rates, "attacked_verdicts": verdicts} if rates else {}


def letters(judge: Judge, prompts: Sequence[str], answers: Sequence[str]) -> str:
    """A judge's verdicts, one letter a prompt."""
    return "".join(LETTERS[verdict] for verdict in verdicts_of(judge, prompts, answers))


def rate(verdicts: str, letter: str) -> dict[str, Any]:
    """Share of one verdict, with its interval."""
    return Rate(verdicts.count(letter), len(verdicts)).to_json()
