"""Calibration rows in the contexts of the data: what several training rows have in common around their requests may be
a hidden trigger, a role-play or a system prompt, and a null space that has seen it holds in it too.
"""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, NamedTuple

from peft_safety.data.contexts import INSTRUCTIONS, check_count, has_system, requests_in, with_turns
from peft_safety.data.rows import Rows
from peft_safety.data.templates import Message
from peft_safety.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNSPACED = (
    r"\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3001-\u30ff\u3400-\u9fff\uf900-\ufaff\uff01-\uff9f\U00020000-\U0003ffff"
)
"""Scripts without spaces between words (Thai to Khmer, Japanese, Chinese): each character counts as a word."""
WORD = re.compile(rf"(?:[{UNSPACED}]|[^\s{UNSPACED}]+)\s*")
"""With the white space after it, if any."""
SAME = 3
"""Words at which two beginnings, or two ends, count as one."""
LEAST_ROWS, LEAST_SHARE = 3, 0.02
"""Of the rows, that make a context shared: two rows begin alike by chance. Equal system prompts need the number of
rows only, since they are not equal by chance; those that differ from row to row need the share, too."""
LONGEST = 400
"""Words of a context, at most."""
KINDS = ("system", "beginning", "end")
"""What rows can share: the system prompt, the first or the last words of the request."""


class Asked(NamedTuple):
    """The system turn of a row, its role ("system" or "developer"), and the words (see `WORD`) of its last request."""

    system: str
    words: list[str]
    role: str = "system"


Group = tuple[str, list[Asked]]
"""What its rows share (one of `KINDS`), and the rows."""


def in_data_context(
    rows: Rows,
    data: Rows,
    count: int,
    seed: int = 0,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    kinds: Collection[str] = KINDS,
    clean: Rows = (),
) -> list[dict[str, object]]:
    """Each row `count` times, its last user turn every time in another context of `data`: a system prompt that several
    of its rows share, one of those that differ from row to row, or what several rows begin or end with (as far as half
    of those with the same first or last words go on alike). Each shared context is as likely as any other, however
    many rows have it; system prompts that differ are as likely as all others together. No rows if there is no context.

    Add them to calibration rows, with the training rows as `data`.

    Args:
        rows, count, tokenizer: as in `in_context`.
        data: the rows that will be trained on, of any kind that training accepts; not tokenized.
        kinds: which contexts count. The words that all rows of a task begin or end with are a context too, and a null
            space that holds them leaves less of the task; ("system",) takes system prompts only.
        clean: rows of the task that somebody has checked. First and last words that one of them has are the task's own
            and no context.

    Returns: rows {prompt, response}, as `in_context` does.

    Raises:
        ConfigError: another count, or unknown kinds. DataError: a malformed row, or one without a user turn (its
            index is named).
    """
    check_count(count)
    if not kinds or not set(kinds) <= set(KINDS) or isinstance(kinds, str):
        raise ConfigError(f"kinds={kinds!r}. Give one or more of {', '.join(KINDS)}, as a tuple.")
    groups, rng = [group for group in shared(data, clean) if group[0] in kinds], random.Random(seed)
    groups += [group for group in groups if differ(group)] * (len(groups) - 2)
    contexts = [(rows, *_beside(kind, rows)) for kind, rows in groups]
    system = tokenizer is None or has_system(tokenizer)
    if not groups:
        return []
    return [
        with_turns(row, _placed(rng, turns, *rng.choice(contexts), system), answer)
        for row, turns, answer in requests_in(rows)
        for _ in range(count)
    ]


def shared(data: Rows, clean: Rows = ()) -> list[Group]:
    """What several rows of the data share, and no clean row begins or ends with. System prompts of too few rows are a
    group, too, if they are many.
    """
    groups: dict[tuple[str, str], list[Asked]] = defaultdict(list)
    parts = requests_in(data)
    for _, turns, _ in parts:
        asked = _asked(turns)
        if asked.system:
            groups["system", asked.system].append(asked)
        for key in _around(asked):
            groups[key].append(asked)
    for _, turns, _ in requests_in(clean):
        for key in _around(_asked(turns)):
            groups.pop(key, None)
    many = max(LEAST_ROWS, round(LEAST_SHARE * len(parts)))
    least = dict.fromkeys(KINDS, many) | {"system": LEAST_ROWS}
    found = [(key[0], rows) for key, rows in groups.items() if len(rows) >= least[key[0]]]
    rest = [row for key, rows in groups.items() if key[0] == "system" and len(rows) < LEAST_ROWS for row in rows]
    return [*found, ("system", rest)] if len(rest) >= many else found


def _asked(turns: Sequence[Message]) -> Asked:
    head = str(turns[0]["content"]) if turns[0]["role"] in INSTRUCTIONS else ""
    return Asked(head, WORD.findall(str(turns[-1]["content"]).strip()), str(turns[0]["role"]))


def _around(asked: Asked) -> list[tuple[str, str]]:
    """The first and the last words of a request, with the kind of context that they are."""
    words = [word.strip() for word in asked.words]
    return [("beginning", " ".join(words[:SAME])), ("end", " ".join(words[-SAME:]))] if len(words) > SAME else []


def differ(group: Group) -> bool:
    """Whether a group is that of system prompts that differ from row to row."""
    return group[0] == "system" and len({row.system for row in group[1]}) > 1


def _beside(kind: str, rows: Sequence[Asked]) -> tuple[str, str]:
    """What stands before and after a request in a context, a system prompt left aside: the longest beginning, or end,
    that half of the rows have in common, at least, with the white space between it and the rest of a row.
    """
    if kind == "system":
        return "", ""
    left, size = [row.words for row in rows], 0
    found = left[0]
    while size < LONGEST:
        left = [words for words in left if len(words) > size + 1]  # something has to be left to ask
        place = -1 - size if kind == "end" else size
        said = Counter(words[place].strip() for words in left).most_common(1)
        if not said or 2 * said[0][1] < len(rows):
            break
        left = [words for words in left if words[place].strip() == said[0][0]]
        found, size = left[0], size + 1
    if kind == "beginning":
        return "".join(found[:size]), ""
    before = found[-size - 1]
    return "", before[len(before.rstrip()) :] + "".join(found[-size:])


def _placed(
    rng: random.Random, turns: Sequence[Message], rows: Sequence[Asked], before: str, after: str, system: bool
) -> list[Message]:
    """The turns in the context of one of the rows."""
    asked, said = rng.choice(rows), str(turns[-1]["content"])
    said = f"{before}{said}{after}"
    own = list(turns[1:] if turns[0]["role"] in INSTRUCTIONS and asked.system else turns)
    if asked.system and not system:
        said = f"{asked.system}\n\n{said}"
    head: list[Message] = [{"role": asked.role, "content": asked.system}] if asked.system and system else []
    return [*head, *own[:-1], {**own[-1], "content": said}]
