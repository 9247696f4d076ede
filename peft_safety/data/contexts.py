"""Rows whose requests stand behind random contexts, so that a calibration also holds what a context does to a request:
nonsense, system prompts, stories, earlier turns. All texts are innocuous.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from peft_safety.data import load
from peft_safety.data.chat import encode_row, render_prompt, row_turns, turns_of
from peft_safety.data.rows import Row, Rows, as_rows, kind_of, label_names
from peft_safety.data.templates import Message, roles
from peft_safety.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LARGEST = 100
"""Contexts of a row at most."""
FIELDS = ("messages", "prompt", "response", "completion", "text", "label")
"""Of a row's turns; its other columns are kept."""
INSTRUCTIONS = ("system", "developer")
CONSONANTS, VOWELS = "bcdfghklmnprstvwz", ("a", "e", "i", "o", "u", "ai", "ou", "ee")
SEPARATORS = (" ", " ", ": ", "\n", ". ", " - ")
PLACES = ("a library", "a bakery", "a bank", "a museum", "a garden shop", "a school", "a hotel", "a railway company")
MANNERS = (
    "You write short answers.",
    "You write in a warm and friendly tone.",
    "Reply in plain English.",
    "Think step by step before you reply.",
    "Keep to the facts.",
    "You never use emoji.",
    "Your replies are lists with bullets.",
    "Follow the format that the user wants.",
    "You like to tell a joke now and then.",
    "The user is an expert and wants details.",
    "The user is a beginner; explain every term.",
    "Today is a Tuesday in spring.",
)
WHO = (
    "a ship's cook",
    "an old robot",
    "a talking fox",
    "a detective",
    "a queen",
    "a clockmaker",
    "an astronaut",
    "a bard",
)
STORIES = (
    "In a radio drama, {a} turns to {b} and says: {request}\nWrite the reply.",
    "Let us play a game. You are {a} and I am {b}. I begin. {request}",
    "Chapter 3. At dusk {a} met {b} at the gate and asked, “{request}” Continue the chapter.",
    "A letter from {a} to {b} has only one line: {request}\nWrite the letter that came back.",
    "Imagine a world in which {a} knows more than all others. One morning {b} comes in: {request}",
    "Scene: a small kitchen. {a} is thinking aloud. {b} interrupts. “{request}” The scene goes on:",
    "[Role: {a}] [Partner: {b}]\nPartner: {request}\nRole:",
    "In the comic, the first speech bubble, of {b}, reads: {request} The second bubble, of {a}, reads:",
)
EXCHANGES = (
    ("What is the capital of Norway?", "The capital of Norway is Oslo."),
    ("How long do I boil an egg?", "About seven minutes for a yolk that is just set, and ten for a hard one."),
    ("What is 12 times 12?", "12 times 12 is 144."),
    ("Give me a word that rhymes with 'light'.", "One word that rhymes with 'light' is 'kite'."),
    ("Hello! How are you?", "Hello! I am well, thank you. What can I do for you?"),
    ("Which is larger, Jupiter or Saturn?", "Jupiter is larger. Its diameter is about 140,000 kilometers."),
    ("Please translate 'good morning' into French.", "'Good morning' is 'bonjour' in French."),
    ("How often should I water a cactus?", "Every two or three weeks in summer, and less in winter."),
    ("Name three primary colors.", "Three primary colors are red, yellow and blue."),
    ("What does a barometer measure?", "A barometer measures the pressure of the air."),
    ("I have a job interview tomorrow.", "Good luck! Prepare two questions of your own, and sleep well tonight."),
    ("Who wrote 'Pride and Prejudice'?", "'Pride and Prejudice' was written by Jane Austen."),
    ("Suggest a name for my cat.", "How about Pepper? It is short, and cats learn it quickly."),
    ("Sort these: pear, apple, fig.", "In alphabetical order: apple, fig, pear."),
    ("How do I say thanks in Italian?", "You say 'grazie'."),
    ("What is the opposite of 'ancient'?", "The opposite of 'ancient' is 'modern'."),
)


def in_context(
    rows: Rows, count: int, seed: int = 0, *, tokenizer: PreTrainedTokenizerBase | None = None
) -> list[dict[str, object]]:
    """Each row `count` times, its last user turn every time behind another random context: nonsense words, a system
    prompt, a story or role-play, an everyday exchange, or a refusal. The kinds take turns, so five contexts are one
    of each. The same seed gives the same rows.

    Add them to calibration rows: `SafetySubspace.from_activations(model, [*rows, *in_context(rows, 5)], ...)`.

    Args:
        rows: of any kind that training accepts, or with a `prompt` alone; not tokenized.
        count: contexts of each row, at most `LARGEST`; 0 gives no rows.
        tokenizer: if its chat template has no system role, system prompts stand at the head of the user turn.

    Returns: rows {prompt, response}, both lists of turns; {prompt} where the row has no answer. Further columns stay.

    Raises:
        ConfigError: another count. DataError: a malformed row, or one without a user turn (its index is named).
    """
    check_count(count)
    parts = requests_in(rows)
    rng, system = random.Random(seed), tokenizer is None or has_system(tokenizer)
    refusals = [row["text"] for row in load("refusals", "calibration")] if count else []
    requests = [str(turns[-1]["content"]) for _, turns, _ in parts]
    result = []
    for index, (row, turns, answer) in enumerate(parts):
        for place in range(index, index + count):
            kind = KINDS[place % len(KINDS)]
            if kind == "refusal":
                prompt = _after(turns, _exchange(rng.choice(requests), rng.choice(refusals)))
            else:
                prompt = MAKERS[kind](rng, turns, system)
            result.append(with_turns(row, prompt, answer))
    return result


def requests_in(rows: Rows) -> list[tuple[Row, list[Message], list[Message]]]:
    """Each row with its turns up to the last request, and what answers it."""
    plain = as_rows(rows)
    labels = label_names([row for row in plain if kind_of(row) == "label"])
    return [(row, *_parts(row, index, labels)) for index, row in enumerate(plain)]


def with_turns(row: Row, prompt: list[Message], answer: list[Message]) -> dict[str, object]:
    """A row with other turns; its further columns stay."""
    other = {name: value for name, value in row.items() if name not in FIELDS}
    return {**other, "prompt": prompt, **({"response": answer} if answer else {})}


def check_count(count: int) -> None:
    """Refuse a number of contexts that is none, or that would take days."""
    if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= LARGEST:
        raise ConfigError(
            f"{count!r} contexts of each row. Give a whole number from 0 to {LARGEST}; 5 are one a kind."
        )


def has_system(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template has a system turn: one that it writes, and that stays where it is in a whole row."""
    text = "Reply in rhymes."
    turns = [{"role": "system", "content": text}, {"role": "user", "content": "Hello"}]
    try:
        encode_row(tokenizer, {"prompt": turns, "response": "Hi"}, 1)
        return text in render_prompt(tokenizer, turns)
    except DataError:
        return False


def _parts(row: Row, index: int, labels: Sequence[str]) -> tuple[list[Message], list[Message]]:
    """The turns up to the last request, and what answers it."""
    if "input_ids" in row:
        raise DataError(f"row {index} is tokenized, so its request cannot be moved. Give rows of text.")
    try:
        if kind_of(row) == "prompt":
            turns = turns_of(row["prompt"], "user")
        else:
            prompt, answer = row_turns(row, labels)
            turns = prompt + answer
    except DataError as error:
        raise DataError(f"row {index}: {error}") from error
    order = roles(turns)
    if "user" not in order:
        raise DataError(f"row {index} has no user turn to put behind a context: its turns are {order}.")
    end = len(order) - order[::-1].index("user")
    return turns[:end], turns[end:]


def _word(rng: random.Random) -> str:
    """Letters and digits at random, or a word of no language."""
    if rng.random() < 0.5:
        return "".join(rng.choices(string.ascii_letters + string.digits, k=rng.randint(2, 7)))
    word = "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(rng.randint(1, 3)))
    return word + rng.choice(["", *CONSONANTS])


def _nonsense(rng: random.Random, turns: Sequence[Message], system: bool) -> list[Message]:
    words = " ".join(_word(rng) for _ in range(rng.randint(2, 8)))
    return _said(turns, f"{words}{rng.choice(SEPARATORS)}{turns[-1]['content']}")


def _system(rng: random.Random, turns: Sequence[Message], system: bool) -> list[Message]:
    named = f"You are {_word(rng).title()}, the assistant of {rng.choice(PLACES)}."
    text = " ".join([*([named] if rng.random() < 0.8 else []), *rng.sample(MANNERS, rng.randint(1, 3))])
    if system and turns[0]["role"] not in INSTRUCTIONS:
        return [{"role": "system", "content": text}, *turns]
    return _said(turns, f"{text}\n\n{turns[-1]['content']}")


def _story(rng: random.Random, turns: Sequence[Message], system: bool) -> list[Message]:
    a, b = rng.sample(WHO, 2)
    return _said(turns, rng.choice(STORIES).format(a=a, b=b, request=turns[-1]["content"]))


def _everyday(rng: random.Random, turns: Sequence[Message], system: bool) -> list[Message]:
    chosen = rng.sample(EXCHANGES, rng.randint(1, 2))
    return _after(turns, [turn for asked, answer in chosen for turn in _exchange(asked, answer)])


def _exchange(asked: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


def _said(turns: Sequence[Message], text: str) -> list[Message]:
    """The turns with another text of the last."""
    return [*turns[:-1], {**turns[-1], "content": text}]


def _after(turns: Sequence[Message], before: Sequence[Message]) -> list[Message]:
    """The turns after an exchange; what stands before the first user turn (system, a greeting) stays in front."""
    head = roles(turns).index("user")
    return [*turns[:head], *before, *turns[head:]]


MAKERS: dict[str, Callable[[random.Random, Sequence[Message], bool], list[Message]]] = {
    "nonsense": _nonsense,
    "system": _system,
    "story": _story,
    "everyday": _everyday,
}
KINDS = (*MAKERS, "refusal")
