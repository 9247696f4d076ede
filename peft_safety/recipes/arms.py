"""The models that `peft-safety evaluate` compares: in this process, or behind an endpoint."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from huggingface_hub import snapshot_download
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import AutoConfig
from transformers.utils import find_adapter_config_file

from peft_safety.core.environment import versions
from peft_safety.core.missing import not_found
from peft_safety.core.names import public_name
from peft_safety.core.snapshot import LIMITS
from peft_safety.data.chat import turns_of
from peft_safety.errors import ConfigError
from peft_safety.evaluation.asking import Asking, Prompt
from peft_safety.evaluation.generate import generate
from peft_safety.evaluation.judges.endpoint import Endpoint
from peft_safety.evaluation.kept import Kept, key_of
from peft_safety.evaluation.metrics import Mean
from peft_safety.evaluation.sets import NamedSet
from peft_safety.evaluation.tasks import exact_answers, response_losses
from peft_safety.evaluation.versions import own_version, version_of
from peft_safety.recipes.load import load_adapter, load_model

Value = TypeVar("Value")
BASE = "base"
ANSWERS = "answers 2"
"""Of the keys of kept answers: those of earlier versions may be sampled, or hold reasoning that nothing marks."""
NO_WEIGHTS = "utility sets need the model's weights. Leave them out, or leave out --url."


class Arm(Protocol):
    """A model that answers."""

    tokenizer: Any

    def respond(self, prompts: Sequence[Prompt], seed: int) -> list[str]:
        """One answer a prompt."""
        ...

    def task(self, part: NamedSet) -> dict[str, Any]:
        """`{"accuracy": outcomes}` of labeled rows, or `{"nll": Mean}` of others."""
        ...


@dataclass
class Local:
    """A model in this process. With `kept`, answers are kept by batch and by the model's `version`: a batch that is
    there is not computed again, and the others are the same batches as in a run that was not stopped.
    """

    model: Any
    tokenizer: Any
    asking: Asking
    batch_size: int
    progress: bool
    kept: Kept | None = None
    version: str = ""

    def respond(self, prompts: Sequence[Prompt], seed: int) -> list[str]:
        order = sorted(range(len(prompts)), key=lambda place: -len(str(prompts[place])))
        answers: dict[int, str] = {}
        with _bar(len(order), self.progress) as bar:
            for start in range(0, len(order), self.batch_size):
                places = order[start : start + self.batch_size]
                given = self._batch([prompts[place] for place in places], seed, start)
                answers.update(zip(places, given, strict=True))
                bar.update(len(places))
        return [answers[place] for place in range(len(prompts))]

    def _batch(self, prompts: list[Prompt], seed: int, start: int) -> list[str]:
        """The answers to one batch; its samples depend on the seed and on where it starts."""
        options: dict[str, Any] = {"max_new_tokens": self.asking.max_new_tokens}
        if self.asking.temperature > 0:
            drawn = int(key_of(seed, start)[:15], 16)
            options |= {"temperature": self.asking.temperature, "seed": drawn}

        def answered() -> list[str]:
            given = generate(self.model, self.tokenizer, prompts, batch_size=len(prompts), progress=False, **options)
            return [answer.text for answer in given]

        return self._once(answered, str, len(prompts), ANSWERS, prompts, options)

    def task(self, part: NamedSet) -> dict[str, Any]:
        options: dict[str, Any] = {"batch_size": self.batch_size, "progress": self.progress}
        key = (part.rows, part.labels, self.batch_size)
        if part.labels:
            measure = partial(exact_answers, self.model, self.tokenizer, part.rows, part.labels, **options)
            return {"accuracy": self._once(measure, bool, len(part.rows), "accuracy", *key)}
        losses = partial(response_losses, self.model, self.tokenizer, part.rows, **options)
        return {"nll": Mean.of(self._once(losses, float, len(part.rows), "nll", *key))}

    def _once(self, make: Callable[[], list[Value]], kind: type[Value], length: int, *asked: Any) -> list[Value]:
        """A list of values that is kept, or that is made and then kept."""
        if self.kept is None:
            return make()
        key = key_of(self.version, versions(self.model), self.model.device.type, str(self.model.dtype), *asked)
        values: list[Value] | None = self.kept.get(key, lambda found: _is_list(found, kind, length))
        if values is None:
            values = make()
            self.kept.add(key, values)
        return values


def _bar(rows: int, shown: bool) -> Any:
    return tqdm(total=rows, desc="generating", unit="row", disable=not shown, leave=False)


def _is_list(value: Any, kind: type, length: int) -> bool:
    return isinstance(value, list) and len(value) == length and all(type(one) is kind for one in value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


@dataclass
class Served:
    """A model behind an OpenAI-compatible endpoint. With `kept`, each answer is kept by the address and the model's
    name, since a server does not say which weights it has.
    """

    endpoint: Endpoint
    asking: Asking
    progress: bool = False
    tokenizer: Any = None
    kept: Kept | None = None

    def respond(self, prompts: Sequence[Prompt], seed: int) -> list[str]:
        kept = Kept() if self.kept is None else self.kept
        turns = [turns_of(prompt, "user") for prompt in prompts]
        options = {"max_tokens": self.asking.max_new_tokens, "temperature": self.asking.temperature, "seed": seed}
        keys = [key_of(self.endpoint.url, self.endpoint.model, asked, options) for asked in turns]
        missing = [place for place, key in enumerate(keys) if kept.get(key, _is_text) is None]
        with _bar(len(missing), self.progress) as bar:
            for number, text in self.endpoint.ask_each([turns[place] for place in missing], **options):
                kept.add(keys[missing[number]], text)
                bar.update()
        return [kept.get(key, _is_text) for key in keys]

    def task(self, part: NamedSet) -> dict[str, Any]:
        raise ConfigError(NO_WEIGHTS)


def local_arms(
    model: str,
    others: Sequence[str],
    asking: Asking,
    *,
    load_in_4bit: bool,
    with_base: bool,
    kept: Kept | None = None,
    **options: Any,
) -> Iterator[tuple[str, Arm]]:
    """The base model, then each adapter on it, or other model, in its place; one after the other in memory.

    Args:
        kept: what was answered so far, by the versions of base and adapter; None keeps nothing.
    """
    folders = [_adapter_folder(path) for path in others]
    base = _Base(model, load_in_4bit)
    for directory in filter(None, folders):
        with base.adapted(directory):
            pass  # one that does not fit is refused before anything is measured
    options["kept"] = kept
    how = " in NF4" if load_in_4bit else ""
    below = "" if kept is None else version_of(model) + how
    if with_base:
        yield BASE, Local(base.model, base.tokenizer, asking, version=below, **options)
    for path, folder, name in zip(others, folders, _names(others), strict=True):
        if folder is None:
            whole, own = load_model(path, load_in_4bit=load_in_4bit)
            yield name, Local(whole, own, asking, version="" if kept is None else version_of(path) + how, **options)
            continue
        version = "" if kept is None else f"{own_version(folder)[0]} on {below}"
        with base.adapted(folder) as adapted:
            yield name, Local(adapted, base.tokenizer, asking, version=version, **options)


def _adapter_folder(name: str) -> str | None:
    """The directory of an adapter, local or fetched from the Hub; None for a whole model, whose config is read."""
    try:
        if find_adapter_config_file(name) is None:
            AutoConfig.from_pretrained(name, trust_remote_code=False)
            return None
        return name if os.path.isdir(name) else snapshot_download(name, allow_patterns=[*LIMITS])
    except (OSError, ValueError) as error:
        raise ConfigError(not_found("adapter or model", name, error)) from error


class _Base:
    """The base model, into which adapters are put one after the other."""

    def __init__(self, source: str, load_in_4bit: bool) -> None:
        self.source, self.load_in_4bit = source, load_in_4bit
        self._load()

    def _load(self) -> None:
        self.model: Any = None  # two do not fit into memory, perhaps
        self.model, self.tokenizer = load_model(self.source, load_in_4bit=self.load_in_4bit)

    @contextmanager
    def adapted(self, folder: str) -> Iterator[Any]:
        """With an adapter, for the block. PEFT leaves an adapter's `modules_to_save`, biases and embeddings in the
        base: then it is loaded again.
        """
        before = self._state()
        adapted, _ = load_adapter(folder, self.model)
        yield adapted
        self.model = adapted.unload()
        if self._state() != before:
            del adapted
            self._load()

    def _state(self) -> list[tuple[str, int, int]]:
        return [(name, id(weight), weight._version) for name, weight in self.model.named_parameters()]


def served_arms(
    url: str,
    model: str,
    others: Sequence[str],
    asking: Asking,
    *,
    with_base: bool,
    kept: Kept | None = None,
    progress: bool = False,
) -> Iterator[tuple[str, Arm]]:
    """The same of models that a server has under these names."""
    names = [*([(BASE, model)] if with_base else []), *zip(_names(others), others, strict=True)]
    for name, served in names:
        yield name, Served(Endpoint(url, served), asking, progress, kept=kept)


def _names(paths: Sequence[str]) -> list[str]:
    """Different names, in which nothing acts upon a terminal or ends a line."""
    shown = [public_name(path) for path in paths]
    if len(set(shown)) < len(shown):  # runs/one/adapter and runs/two/adapter differ in the part before
        pairs = zip(shown, paths, strict=True)
        shown = [name if name == path else "/".join(Path(path).parts[-2:]) for name, path in pairs]
    names = ["".join(x if x.isprintable() else "?" for x in name) for name in shown]
    numbered = [f"{name} ({i})" for i, name in enumerate(names, 1)]
    result = [
        full if names.count(name) > 1 or name == BASE else name for name, full in zip(names, numbered, strict=True)
    ]
    return result if len(set(result)) == len(result) else numbered
