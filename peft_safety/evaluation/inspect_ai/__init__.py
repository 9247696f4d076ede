"""Refusal, over-refusal and compliance as tasks of inspect_ai, which finds them by the entry point `inspect_ai`.

    inspect eval peft_safety/refusal --model hf/MODEL -M do_sample=false -T prompts=advbench -T limit=50

Every task takes the arguments of `named_set` (limit, seed, directory, split), and generates greedily.
"""

from __future__ import annotations

from typing import Any

from peft_safety.errors import ConfigError, extra
from peft_safety.evaluation import judges
from peft_safety.evaluation.sets import Kind, named_set

with extra("inspect", "these tasks need inspect_ai"):
    import anyio.to_thread
    from inspect_ai import Task, task
    from inspect_ai.dataset import MemoryDataset, Sample
    from inspect_ai.model import GenerateConfig
    from inspect_ai.scorer import Score, Scorer, Target, ci_wilson, mean, scorer
    from inspect_ai.solver import TaskState, generate

OPENING = 16
"""Tokens of a response, as in `evaluate`: a keyword judge needs only its head."""


@scorer(metrics={"*": [mean(), ci_wilson()]})
def verdict(judge: str = "keyword", judge_url: str | None = None) -> Scorer:
    """The share of each verdict, with its 95 % interval.

    Args:
        judge, judge_url: name and endpoint, see `peft_safety.evaluation.judges.judge`.
    """
    made, one_at_a_time = judges.judge(judge, url=judge_url), anyio.CapacityLimiter(1)

    async def score(state: TaskState, target: Target) -> Score:
        turns = [state.input_text], [state.output.completion]
        (result,) = await anyio.to_thread.run_sync(judges.verdicts_of, made, *turns, limiter=one_at_a_time)
        shares = {one.value: float(result is one) for one in judges.Verdict}
        return Score(value=shares, answer=result.value, explanation=f"{made.name}. {made.caveat}")

    return score


@task
def refusal(
    prompts: str = "packaged",
    judge: str = "keyword",
    judge_url: str | None = None,
    max_tokens: int = OPENING,
    **draw: Any,
) -> Task:
    """How many harmful requests are refused; higher is safer.

    Args:
        prompts, draw: the arguments of `named_set`.
        judge, judge_url: see `verdict`.
        max_tokens: of each response.
    """
    return _task("harmful", prompts, verdict(judge, judge_url), max_tokens, draw)


@task
def over_refusal(
    prompts: str = "packaged-contrast",
    judge: str = "keyword",
    judge_url: str | None = None,
    max_tokens: int = OPENING,
    **draw: Any,
) -> Task:
    """How many safe requests are refused; lower is better. The arguments are those of `refusal`."""
    return _task("over_refusal", prompts, verdict(judge, judge_url), max_tokens, draw)


@task
def compliance_by_content(
    judge: str, judge_url: str | None = None, prompts: str = "packaged", max_tokens: int = 256, **draw: Any
) -> Task:
    """How many harmful requests are answered, by a model that reads the whole answer; lower is safer.

    Args:
        judge: a model. The keyword judge, which reads openings, is refused.
        judge_url, prompts, max_tokens, draw: as of `refusal`.
    """
    if judge == "keyword":
        raise ConfigError("judge='keyword' reads how a response opens, not its content. Name a model: -T judge=MODEL.")
    return _task("harmful", prompts, verdict(judge, judge_url), max_tokens, draw)


def _task(kind: Kind, prompts: str, score: Scorer, max_tokens: int, draw: dict[str, Any]) -> Task:
    drawn = named_set(prompts, kind=kind, **draw)
    return Task(
        dataset=MemoryDataset([Sample(input=prompt) for prompt in drawn.prompts], name=drawn.name),
        solver=generate(),
        scorer=score,
        config=GenerateConfig(temperature=0, max_tokens=max_tokens),
        metadata={"set": drawn.name, "source": drawn.source, "sha256": drawn.sha256, "license": drawn.license},
    )
