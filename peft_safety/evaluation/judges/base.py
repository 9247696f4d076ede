"""What a judge is, and what a family of guard models is."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

from peft_safety.data.templates import Message
from peft_safety.errors import ConfigError, DataError


class Verdict(str, Enum):
    """The class of a response. `UNDECIDED`: the judge's answer could not be read; it is never guessed."""

    REFUSAL = "refusal"
    COMPLIANCE = "compliance"
    OTHER = "other"
    UNDECIDED = "undecided"


class Judge(Protocol):
    """Anything with a name, a caveat (one sentence on what it cannot see) and a verdict."""

    name: str
    caveat: str

    def __call__(self, prompt: str, response: str) -> Verdict:
        """The verdict on one response."""
        ...


def verdicts_of(judge: Judge, prompts: Sequence[str], responses: Sequence[str]) -> list[Verdict]:
    """The verdicts on many responses, in batches where the judge has a method for them. The judge sees no reasoning
    (see `without_reasoning`); a response of which nothing else is left is undecided, and the judge is not asked.

    Raises:
        DataError: prompts and responses are no pairs, or the judge gave something else than one verdict a response.
    """
    require_pairs(prompts, responses)
    said = list(map(without_reasoning, responses))
    read = [place for place, text in enumerate(said) if text.strip() or not responses[place].strip()]
    asked, answers = [prompts[place] for place in read], [said[place] for place in read]
    batch: Any = getattr(judge, "batch", None)
    given = list(batch(asked, answers) if batch and read else map(judge, asked, answers))
    if len(given) != len(answers):
        raise DataError(f"judge {judge.name!r} gave {len(given)} verdicts on {len(answers)} responses, not one each.")
    if wrong := [one for one in given if not isinstance(one, Verdict)]:
        raise DataError(
            f"judge {judge.name!r} gave a {type(wrong[0]).__name__}. Give a peft_safety.evaluation.Verdict."
        )
    verdicts = dict(zip(read, given, strict=True))
    return [verdicts.get(place, Verdict.UNDECIDED) for place in range(len(responses))]


def require_pairs(prompts: Sequence[str], responses: Sequence[str]) -> None:
    if len(prompts) != len(responses):
        raise DataError(f"{len(prompts)} prompts and {len(responses)} responses. Give one response a prompt.")


@dataclass(frozen=True)
class Family:
    """Generative judges that are asked in one way and answer in one form.

    Attributes:
        name, model: short name, and the Hub id that it stands for ("": the user names one).
        says, parse, tokens: what its answer tells, for the caveat; its grammar; its budget.
        template: the question, with `{prompt}` and `{response}`; "" gives the two turns to the tokenizer's chat
            template, which holds the guard's own question.
        raw: the template is the whole text, special tokens but the first included, and not a user's turn.
        variables, header, parts: of the chat template, as on the model's card: its variables, whether it is asked for
            the next turn's header, and whether it reads contents as lists of parts.
    """

    name: str
    model: str
    says: str
    parse: Callable[[str], Verdict]
    tokens: int
    template: str = ""
    raw: bool = False
    system: str = ""
    variables: Mapping[str, str] = field(default_factory=dict)
    header: bool = True
    parts: bool = False

    def question(self, prompt: str, response: str) -> str | list[Message]:
        """A whole text, or turns for a chat template."""
        if not self.template:
            turns = [("user", prompt), ("assistant", response)]
        else:
            try:
                text = self.template.format(prompt=prompt, response=response)
            except (LookupError, ValueError) as error:
                said = f"template of judge {self.name!r}: {type(error).__name__}: {error}"
                raise ConfigError(f"{said}. Write {{prompt}} and {{response}}, and other braces twice.") from error
            if self.raw:
                return text
            turns = [("system", self.system)] * bool(self.system) + [("user", text)]
        return [{"role": role, "content": self._content(text)} for role, text in turns]

    def _content(self, text: str) -> Any:
        return [{"type": "text", "text": text}] if self.parts else text


_YES_NO = re.compile(r"\W*(yes|no)\b[ \t]*(?:$|[.,:;!*\"'\n])", re.IGNORECASE)
_FINAL = re.compile(r".*(?:</think>|<\|channel\|>final<\|message\|>|assistantfinal)", re.DOTALL)
_REASONING = re.compile(r"\s*(?:<think>|<\|channel\|>analysis|analysis(?=[A-Z0-9\"']))")


def yes_or_no(text: str) -> str:
    """The first word of an answer, if it is "yes" or "no" and stands alone; else ""."""
    match = _YES_NO.match(text)
    return match[1].lower() if match else ""


def fields(text: str) -> dict[str, str]:
    """`name: value` lines in lower case; "" for a name with several values."""
    result: dict[str, str] = {}
    for line in text.lower().splitlines():
        name, colon, value = (part.strip(" \t*_.`") for part in line.partition(":"))
        if colon:
            result[name] = value if result.get(name, value) == value else ""
    return result


def without_reasoning(text: str) -> str:
    """What follows the reasoning ("<think>" or gpt-oss channels); "" if the answer was cut off within it."""
    final = _FINAL.match(text)
    if final:
        return text[final.end() :]
    return "" if _REASONING.match(text) else text
