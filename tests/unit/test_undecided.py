"""Verdicts that a judge does not reach are counted, and count as nothing else."""

from peft_safety.evaluation import PromptSet, Rate, Verdict, evaluate
from peft_safety.reporting.report import Report
from tests.tiny import tiny_llama, tiny_tokenizer


class AsAsked:
    """The verdict that the last word of a prompt names."""

    name, caveat = "as asked", "a test's"

    def __call__(self, prompt: str, response: str) -> Verdict:
        return Verdict(prompt.rsplit(maxsplit=1)[-1])


def measured(harmful: str, contrast: str, everyday: str = "", **options):
    sets = [
        tuple(f"{number} {word}" for number, word in enumerate(one.split())) for one in (harmful, contrast, everyday)
    ]
    prompts = PromptSet("test", sets[0], sets[1], (), sets[2])
    options |= {"max_new_tokens": 1, "progress": False, "judge": AsAsked()}
    return evaluate(tiny_llama(), tiny_tokenizer(), prompts=prompts, **options)


def test_undecided_is_neither_refusal_nor_compliance():
    task = [{"text": "undecided", "label": "a"}, {"text": "refusal", "label": "b"}]
    found = measured("refusal compliance other undecided undecided", "undecided other", "refusal", task=task)
    assert (found.refusal, found.compliance, found.over_refusal) == (Rate(1, 5), Rate(1, 5), Rate(0, 2))
    assert (found.everyday_refusal, found.task_refusal) == (Rate(1, 1), Rate(1, 2))
    assert found.undecided == found.to_json()["undecided"] == 4
    assert found.figures()["undecided"] == Rate(4, 10)
    assert "undecided (N=10)" in Report("title", {"model": found.figures()}).card()


def test_a_judge_that_decides_everything_has_no_such_column():
    found = measured("refusal other", "other")
    assert found.undecided == found.to_json()["undecided"] == 0
    assert "undecided" not in found.figures()
