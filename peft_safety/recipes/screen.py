"""Screening of a data set: the aligned model's scores, and its own verdict on the rows that they flag."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path
from typing import Any

from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_safety.core import files
from peft_safety.data import stream_jsonl
from peft_safety.data.rows import Row, Rows, kind_of, label_list, plain_row, records
from peft_safety.errors import ConfigError, DataError
from peft_safety.evaluation.generate import generate
from peft_safety.evaluation.judges import Judge, KeywordJudge, Verdict, verdicts_of
from peft_safety.evaluation.judges.base import without_reasoning
from peft_safety.recipes.bench import JUDGED_TOKENS
from peft_safety.recipes.load import load_model
from peft_safety.screening.requests import Request, requests_of
from peft_safety.screening.result import COMPLIES, UNDECIDED, VERDICTS, ScreenedRow, Screening
from peft_safety.screening.screen import KNOWN, Screen
from peft_safety.screening.states import by_first, join_processes, process, shared_out

CHUNK = 512
"""Rows that each process holds at a time; batches of one length are made from them."""


def screen(
    model: str | Path | PreTrainedModel | PeftModel,
    rows: str | Path | Rows,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    fpr: float = 0.01,
    clean: str | Path | Rows | None = None,
    fitted: Screen | None = None,
    known: int = KNOWN,
    verdict: bool = True,
    judge: Judge | None = None,
    by: str | None = None,
    labels: Sequence[Any] | None = None,
    load_in_4bit: bool = False,
    max_length: int = 1024,
    batch_tokens: int = 4096,
    progress: bool = True,
) -> Screening:
    """Score every row by how much the aligned model takes its requests for harmful ones, before fine-tuning.

    Each user turn has a score: the projection of the hidden state at the last token of its prompt, header of the
    answer included, on a direction between the package's harmful requests and its everyday and contrast prompts. A
    row's score is that of its highest turn. Of flagged turns the model is then asked for its own answer: the verdict
    says whether it refuses where the row complies. Rows without a user turn are counted as not screened, and kept.

    Args:
        model: the aligned model: hub id, directory, or a loaded causal language model, quantized or not.
        rows: a JSON-lines file, or rows of any kind that training accepts or with a `prompt` alone: a list, a data
            set, or a stream of any length.
        tokenizer: with a chat template; default the model's own.
        fpr: share of the package's harmless validation prompts that may be flagged; or of `clean`.
        clean: rows of your own that you have checked, at least one: the threshold is set on them. More poison is found
            so where your rows look less harmful than the package's contrast prompts.
        fitted: the screen of an earlier result on the same model (`result.screen`), which is used as it is: with its
            rate, threshold, `max_length` and `batch_tokens`. It saves reading the known prompts again.
        known: packaged prompts of each file and split that a new screen learns from, at most.
        verdict: ask the model for its own answer to flagged requests. One that reasons first does not come to an
            answer in the tokens that are read: its verdicts are "undecided", which drops no row. Give False then.
        judge: of refusals, default `KeywordJudge`, which reads English: where the model refuses in another language,
            the verdict is "answered", and the row is kept. The first process judges.
        by: a column; rows are counted by its values, default by their kind.
        labels: every label of {text, label} rows; needed for those of a stream only.
        load_in_4bit: quantize a model that is given by name.
        max_length: tokens kept of a turn with what is before it, from the right; at most the model's positions.
        batch_tokens: tokens of a batch, padding included.
        progress: show a bar, in the first process.

    Returns:
        A `Screening`: scores, flags and verdicts by number of the row, and `kept`, the numbers of the rows to train
        on. Among several processes (`accelerate launch`) all call this with the same rows; they share the work, and
        each gets the whole result. Every process needs a whole model.

    Raises:
        ConfigError: an option out of range, `clean` beside `fitted`, or `fitted` on a model of another size.
        DataError: a malformed row (its number is named), no rows, no user turn in any, no chat template.
        CalibrationError: the model does not tell harmful requests from others.
    """
    if not isinstance(fitted, (Screen, type(None))):
        raise ConfigError(
            f"fitted= is a {type(fitted).__name__}. Give the screen of an earlier result: result.screen."
        )
    if fitted is not None and clean is not None:
        raise ConfigError("clean rows set the threshold of a new screen, and fitted= has one. Give one of the two.")
    join_processes()
    source = _Source(rows)
    names, total = source.labels(labels)  # reads the file once, before a model is loaded
    if total == 0:
        raise _nothing(0)
    bare = model.get_base_model() if isinstance(model, PeftModel) else model
    loaded, tokenizer = load_model(bare, tokenizer, load_in_4bit=load_in_4bit)
    reader: Any = model if isinstance(model, PeftModel) else loaded
    rank, world = process()
    progress = progress and rank == 0
    max_length = min(max_length, _positions(reader)) if fitted is None else fitted.max_length
    chunks = _chunks(tokenizer, source, max_length, names, by, CHUNK * world)
    first = next(chunks, ([], []))  # a malformed row is told before the known prompts are read, which takes minutes
    if len(first[0]) < CHUNK * world and not any(first[0]):
        raise _nothing(len(first[0]))
    if fitted is None:
        reading: dict[str, Any] = {"max_length": max_length, "budget": batch_tokens, "progress": progress}
        checked = [] if clean is None else _clean(tokenizer, clean, max_length, names)
        fitted = Screen.fit(reader, tokenizer, fpr=fpr, clean=checked, known=known, **reading)
    asked = (judge or KeywordJudge()) if verdict else None
    result: list[ScreenedRow] = []
    with tqdm(total=total, desc="screening", unit="row", disable=not progress, leave=False) as bar:
        for requests, groups in chain([first], chunks):
            result += _screened(reader, tokenizer, fitted, asked, requests, groups, len(result))
            bar.update(len(groups))
    if all(row.score is None for row in result):
        raise _nothing(len(result))
    return Screening(result, fitted, asked.name if asked else None)


def _nothing(count: int) -> DataError:
    what = f"none of the {count} rows has a user turn to screen" if count else "there are no rows to screen"
    return DataError(f"{what}. Give rows with prompts, or turns of the role user.")


def _chunks(
    tokenizer: PreTrainedTokenizerBase,
    source: _Source,
    max_length: int,
    labels: Sequence[str],
    by: str | None,
    size: int,
) -> Iterator[tuple[list[list[Request]], list[str]]]:
    """The requests of so many rows at a time, and the group of each row."""
    numbered = enumerate(source)
    while chunk := list(islice(numbered, size)):
        yield (
            [requests_of(tokenizer, row, number, max_length, labels) for number, row in chunk],
            [str(row.get(by)) if by else kind_of(plain_row(row)) or "" for _, row in chunk],
        )


def _clean(
    tokenizer: PreTrainedTokenizerBase, rows: str | Path | Rows, max_length: int, labels: Sequence[str]
) -> list[list[int]]:
    source = _Source(rows)
    try:
        labels = labels or source.labels(None)[0]
        found = [requests_of(tokenizer, row, n, max_length, labels) for n, row in enumerate(source)]
    except DataError as error:
        raise DataError(f"clean rows: {error}") from error
    if not any(found):
        raise DataError(f"none of the {len(found)} clean rows has a user turn. Give rows with prompts, or none.")
    return [request.ids for row in found for request in row]


def _screened(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    fitted: Screen,
    judge: Judge | None,
    requests: Sequence[Sequence[Request]],
    groups: Sequence[str],
    start: int,
) -> Iterator[ScreenedRow]:
    """One chunk of rows."""
    known = [row for row in requests if row]
    scored = iter(fitted.scores(model, known))
    pairs = [list(zip(row, next(scored), strict=True)) if row else [] for row in requests]
    high = [request for row in pairs for request, score in row if score > fitted.threshold]
    verdicts = dict(zip(((r.row, r.turn) for r in high), _verdicts(model, tokenizer, judge, high), strict=True))
    for number, (row, group) in enumerate(zip(pairs, groups, strict=True), start):
        if not row:
            yield ScreenedRow(number, group)
            continue
        top, score = max(row, key=lambda pair: pair[1])
        flagged = score > fitted.threshold
        said = [verdicts[r.row, r.turn] for r, _ in row if (r.row, r.turn) in verdicts]
        worst = min((one for one in said if one is not None), key=list(VERDICTS).index, default=None)
        cut, text = any(request.cut for request, _ in row), top.text if flagged else None
        yield ScreenedRow(number, group, score, top.turn, flagged, worst, cut, text)


def _verdicts(
    model: Any, tokenizer: PreTrainedTokenizerBase, judge: Judge | None, requests: Sequence[Request]
) -> list[str | None]:
    """A key of `VERDICTS` for each request; the model answers only where the row does, and does not refuse. A row that
    reasons is no refusal, whatever it says in the end, since its thoughts are trained on as well.
    """
    if judge is None:
        return [None] * len(requests)
    result: list[str | None] = ["no answer"] * len(requests)
    answered = [place for place, request in enumerate(requests) if request.answer is not None]
    texts = {place: str(requests[place].answer) for place in answered}
    plain = [place for place in answered if without_reasoning(texts[place]) == texts[place]]
    own = _judged(judge, requests, plain, [texts[place] for place in plain])
    asked = [place for place in answered if own.get(place) not in (Verdict.REFUSAL, Verdict.UNDECIDED)]

    def run(part: Sequence[int]) -> list[str]:
        room = max(1, _positions(model) - JUDGED_TOKENS)
        prompts = [requests[place].ids[-room:] for place in part]
        options: dict[str, Any] = {"max_new_tokens": JUDGED_TOKENS, "rendered": True, "progress": False}
        answers = generate(model, tokenizer, prompts, **options) if prompts else []
        return [answer.text for answer in answers]

    models = _judged(judge, requests, asked, shared_out(asked, run))
    for place in answered:
        last = models[place] if place in models else own[place]
        said = "refuses" if place not in models else COMPLIES if last is Verdict.REFUSAL else "answered"
        result[place] = UNDECIDED if last is Verdict.UNDECIDED else said
    return result


def _judged(
    judge: Judge, requests: Sequence[Request], places: Sequence[int], responses: Sequence[str]
) -> dict[int, Verdict]:
    """Verdicts of the first process's judge: another may not give the same."""
    prompts = [requests[place].text for place in places]
    return dict(zip(places, by_first(lambda: verdicts_of(judge, prompts, responses)) if prompts else [], strict=True))


def _positions(model: Any) -> int:
    """Tokens that the model has positions for; where its config names none, without end."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


class _Source:
    """Rows that can be gone through again, unless they are a stream."""

    def __init__(self, rows: str | Path | Rows) -> None:
        self.rows: Any = rows
        self.path = rows if isinstance(rows, (str, os.PathLike)) else None

    def __iter__(self) -> Iterator[Row]:
        return iter(stream_jsonl(self.path) if self.path is not None else records(self.rows, "rows", limit=None))

    def labels(self, given: Sequence[Any] | None) -> tuple[list[str], int | None]:
        """All labels as training sorts them, and how many rows there are, as far as it is known."""
        if self.path is None and not hasattr(self.rows, "__len__"):
            return [] if given is None else label_list(given), None
        names, count = set(), 0
        for row in self:
            count += 1
            with suppress(DataError):  # told by the number of the row, when it is screened
                plain = plain_row(row) if isinstance(row, Mapping) and given is None else {}
                names |= {plain["label"]} if kind_of(plain) == "label" else set()
        return label_list(sorted(names) if given is None else given) if names or given else [], count


def check_kept(data: str | Path, out: str | Path) -> None:
    """Before the work: a ConfigError refuses the data itself as the file for its kept rows, an ArtifactError one that
    cannot be written.
    """
    target, source = Path(out), Path(data)
    if target.exists() and source.exists() and target.samefile(source):
        raise ConfigError(f"{target} is the data itself. Give another file.")
    files.check_place(target)


def write_kept(data: str | Path, out: str | Path, dropped: Collection[int]) -> Path:
    """Write the rows of a JSON-lines file, without those of the numbers `dropped`, to another file, by one rename."""
    check_kept(data, out)
    target, source = Path(out), Path(data)
    without, escape = set(dropped), "backslashreplace"  # JSON's own escape of a surrogate
    with files.replacing(target) as staged, staged.open("w", encoding="utf-8", errors=escape) as file:
        for number, row in enumerate(_Source(source)):
            if number not in without:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return target
