"""Judges by name or model id."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Any

from peft_safety.errors import ConfigError
from peft_safety.evaluation.judges import (
    harmbench,
    llama_guard,
    qwen3guard,
    rubric,
    shieldgemma,
    strongreject,
    wildguard,
)
from peft_safety.evaluation.judges.base import Family, Judge
from peft_safety.evaluation.judges.embedding import EmbeddingJudge
from peft_safety.evaluation.judges.encoder import SUFFIX, ClassifierJudge, architectures
from peft_safety.evaluation.judges.endpoint import Endpoint
from peft_safety.evaluation.judges.guard import GuardJudge
from peft_safety.evaluation.judges.keyword import KeywordJudge
from peft_safety.evaluation.judges.local import LocalRunner

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        harmbench.LLAMA,
        harmbench.MISTRAL,
        llama_guard.THREE,
        llama_guard.FOUR,
        wildguard.WILDGUARD,
        qwen3guard.QWEN3GUARD,
        shieldgemma.SHIELDGEMMA,
        strongreject.SCORER,
        strongreject.RUBRIC,
        rubric.SAFEGUARD,
        rubric.CHAT,
    )
}
KEYWORD, EMBEDDING, REJECTION = "keyword", "embedding", "rejection"
REJECTION_MODEL = "protectai/distilroberta-base-rejection-v1"
UNSERVED = (KEYWORD, EMBEDDING, REJECTION)
"""Judges that no server runs."""
JUDGES = (*UNSERVED, *FAMILIES)
"""The short names."""
CLASSIFIER = "sees", "labels", "max_length"
GUARD = "template", "tokens", "max_length"
SERVED = "url", "timeout", "retries", "workers", "body"
LOCAL = ("load_in_4bit",)
"""Options by kind of judge."""


def judge(
    name_or_id: str,
    *,
    url: str | None = None,
    load_in_4bit: bool = False,
    batch_size: int = 16,
    cache: str | Path | None = None,
    **options: Any,
) -> Judge:
    """A judge by name.

    Args:
        name_or_id: a short name of `JUDGES`; "NAME:MODEL", another model of that kind, as a Hub id, a directory or
            the name under which it is served; or a Hub id or directory alone, whose kind its name tells
            ("meta-llama/Llama-Guard-3-1B"). Other sequence classifiers are read by their labels, and other models are
            asked by a rubric.
        url: of an OpenAI-compatible endpoint that runs the model ("http://localhost:8000/v1").
        load_in_4bit: quantize a generative model that runs here to NF4.
        batch_size: rows at once of a model that runs here.
        cache: file that keeps the verdicts of a judge that generates text (see `GuardJudge`); the others take seconds.
        options: of a sequence classifier `sees`, `labels`, `max_length`; of others `template`, `tokens`, `max_length`
            (see `GuardJudge`), and at an endpoint `timeout`, `retries`, `workers`, `body` (see `Endpoint`).

    Raises:
        ConfigError: an unknown name, an option that the judge does not have, or no such model.
    """
    kind, model = _parse(name_or_id, url)
    options |= {"url": url} if url else {}
    options |= {"load_in_4bit": True} if load_in_4bit else {}
    known = {KEYWORD: (), EMBEDDING: (), REJECTION: CLASSIFIER}.get(kind, GUARD + (SERVED if url else LOCAL))
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ConfigError(f"judge {name_or_id!r} has no option {unknown[0]!r}. It has: {', '.join(known) or 'none'}.")
    if kind == KEYWORD:
        return KeywordJudge()
    if kind == EMBEDDING:
        return EmbeddingJudge(model or None)
    if kind == REJECTION:
        return ClassifierJudge(model, batch_size=batch_size, **options)
    if not model:
        raise ConfigError(f'judge {name_or_id!r} needs a model. Name it: "{kind}:MODEL".')
    where = {option: options.pop(option) for option in (*SERVED, *LOCAL) if option in options}
    runner = Endpoint(model=model, **where) if url else LocalRunner(model, batch_size=batch_size, **where)
    return GuardJudge(FAMILIES[kind], runner, cache=cache, **options)


def _parse(name: str, url: str | None) -> tuple[str, str]:
    """Short name and model."""
    short, colon, model = name.partition(":")
    if short in JUDGES:
        default = FAMILIES[short].model if short in FAMILIES else REJECTION_MODEL if short == REJECTION else ""
        return short, model or default
    if not name or ((colon or "/" not in name) and not Path(name).is_dir()):
        near = get_close_matches(short.lower(), JUDGES, 1, 0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"no judge {name!r}.{hint} Give one of {', '.join(JUDGES)}, a Hub id or a directory; another chat model "
            f'is "rubric:MODEL".'
        )
    last = Path(name).name.lower()
    kind = next((family for family in FAMILIES if last.startswith(family)), None)
    if kind is None:
        classifier = not url and any(one.endswith(SUFFIX) for one in architectures(name))
        kind = REJECTION if classifier else rubric.CHAT.name
    return kind, name
