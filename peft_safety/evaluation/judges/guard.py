"""A judge that asks a generative model, here or at an endpoint, and keeps what was judged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from peft_safety.errors import ConfigError
from peft_safety.evaluation.judges.base import Family, Verdict, require_pairs
from peft_safety.evaluation.kept import Kept, key_of

RESPONSE_TOKENS = 512
"""Of a response that are judged, as in HarmBench and StrongREJECT."""


class Runner(Protocol):
    """Where the model runs."""

    model: str

    @property
    def url(self) -> str | None:
        """Of the server; None if it runs here."""
        ...

    @property
    def version(self) -> str:
        """Which weights these are, as far as it can be known."""
        ...

    def shorten(self, text: str, tokens: int) -> str:
        """The first tokens of a text."""
        ...

    def answers(self, family: Family, pairs: Sequence[tuple[str, str]]) -> Iterator[tuple[int, str]]:
        """The model's answers with the numbers of their pairs, in any order, each as soon as it is there."""
        ...


class GuardJudge:
    """A family's verdicts by one model. An empty response is neither refusal nor compliance, and is not asked about.

    Args:
        family, runner: how it is asked, and where.
        template, tokens: instead of the family's own question (a text with `{prompt}` and `{response}`) and budget.
        max_length: tokens of a response that are judged; its end is left out.
        cache: a JSON-lines file that keeps the verdicts, by hash of the pair and without its text: after an error, or
            in another process, what was judged is not asked again. Without it the verdicts live as long as the judge.
    """

    def __init__(
        self,
        family: Family,
        runner: Runner,
        *,
        template: str | None = None,
        tokens: int | None = None,
        max_length: int = RESPONSE_TOKENS,
        cache: str | Path | None = None,
    ) -> None:
        if template is not None and not all(part in template for part in ("{prompt}", "{response}")):
            raise ConfigError(f"template of judge {family.name!r}: write {{prompt}} and {{response}} in it.")
        tokens = family.tokens if tokens is None else tokens
        if min(tokens, max_length) < 1:
            raise ConfigError(f"judge {family.name!r}: tokens = {tokens}, max_length = {max_length}. Give at least 1.")
        self.family = replace(family, template=template or family.template, tokens=tokens)
        self.family.question("", "")
        self.runner, self.max_length = runner, max_length
        name = Path(runner.model).name
        self.name = f"{family.name}:{name}"
        own = " It is asked in this package's words, not in its authors'." if family.raw and template is None else ""
        self.caveat = f"Judged by {name}, which says {family.says}; its own errors are not in the intervals.{own}"
        self._kept = Kept(cache)

    @property
    def version(self) -> str:
        return self.runner.version

    def __call__(self, prompt: str, response: str) -> Verdict:
        return self.batch([prompt], [response])[0]

    def batch(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Verdict]:
        """The verdicts on many. After an error a second call goes on where the first one stopped."""
        require_pairs(prompts, responses)
        keys = [self._key(*pair) if pair[1].strip() else None for pair in zip(prompts, responses, strict=True)]
        asked = {
            key: (prompt, self.runner.shorten(response, self.max_length))
            for key, prompt, response in zip(keys, prompts, responses, strict=True)
            if key is not None and self._kept.get(key, _is_verdict) is None
        }
        names = list(asked)
        for number, answer in self.runner.answers(self.family, list(asked.values())) if asked else ():
            self._kept.add(names[number], self.family.parse(answer).value)
        return [Verdict.OTHER if key is None else Verdict(self._kept.get(key, _is_verdict)) for key in keys]

    def _key(self, prompt: str, response: str) -> str:
        how = (
            self.family.name,
            self.runner.model,
            self.version,
            self.runner.url,
            self.family.question(prompt, response),
        )
        return key_of(*how, sorted(self.family.variables.items()), self.family.tokens, self.max_length)


def _is_verdict(value: Any) -> bool:
    return isinstance(value, str) and value in {one.value for one in Verdict}
