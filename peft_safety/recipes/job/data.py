"""The rows of a job: read by `datasets`, split, and put into TRL's formats."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

import peft_safety
from peft_safety.core import files
from peft_safety.core.checks import is_number
from peft_safety.data import affirmation_pairs
from peft_safety.data.chat import IGNORE_INDEX, Feature, chat_of, encode_row, row_turns
from peft_safety.data.rows import SHAPES, Row, kind_of, label_names, plain_row
from peft_safety.data.templates import Message, plain_messages, roles
from peft_safety.errors import ConfigError, DataError, extra
from peft_safety.evaluation.tasks import WHOLE

with extra("trl", "a job needs TRL"):
    from datasets import Dataset, DatasetDict, concatenate_datasets, load_dataset
    from trl.data_utils import maybe_convert_to_chatml

READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
SHUFFLE = 42
"""Seed of the split into training and held-out rows: the same rows whatever the seed of training is."""
DIGESTED = 1000
"""Rows read at once for a digest."""
WITHOUT: dict[str, Any] = {"tools": "null", "chat_template_kwargs": {}}
"""What TRL and this package read as no tools and no variables, in rows without these columns of other rows."""
MASKS = ("completion_mask", "assistant_masks")
"""Columns of tokenized rows: 1 for a token with a loss."""


@dataclass(frozen=True)
class JobData:
    """Rows in TRL's formats, the held-out ones as they were read too, and the labels of a classification."""

    train: Dataset
    held_out: Dataset | None
    raw: Dataset | None
    labels: list[str]

    def digest(self) -> str:
        """sha256 of the rows: what a name stands for may change, on the hub or in a directory."""
        result = hashlib.sha256()
        for part in filter(None, (self.train, self.held_out)):
            for rows in part.with_format("arrow").iter(DIGESTED):
                result.update(json.dumps(rows.to_pylist(), sort_keys=True, default=str).encode())
        return result.hexdigest()


def read_data(script: Any, text_field: str, share: float, poison: float = 0.0, seed: int = 0) -> JobData:
    """The rows that TRL's `ScriptArguments` name: a JSON-lines, JSON, CSV or parquet file, a directory or a hub id.

    Rows are held out as the data say (a split `dataset_test_split`, or a column "split" in each row), else a `share`.

    Raises:
        ConfigError: a share that is none, or streamed data. DataError: no such data, or rows of another kind.
    """
    if script.dataset_streaming:
        raise ConfigError("dataset_streaming: a plan and held-out rows need the number of rows. Leave it out.")
    for name, value in (("held_out", share), ("poison", poison)):
        if not is_number(value, 0, 1) or (name == "held_out" and value == 1):
            raise ConfigError(f"{name}={value}. Give a share of the rows from 0 to below 1.")
    train, test = _split(_load(script), script, share)
    labels: list[str] = []
    if {"text", "label"} <= set(train.column_names):
        labels = label_names([row for part in (train, test) if part for row in part.select_columns(["text", "label"])])
    convert = partial(_converted, labels=labels, text_field=text_field)
    shaped = [part if part is None else convert(part) for part in (train, test)]
    return JobData(_poisoned(shaped[0], poison, seed), shaped[1], test, labels)


def has_turns(data: Dataset) -> bool:
    """Whether the rows are chat: {messages}, or {prompt, completion} of turns; not plain text and not tokens."""
    return "messages" in data.column_names or isinstance(data[0].get("prompt"), list)


def unanswered(data: Dataset, silent: bool = False) -> int:
    """How many {messages} rows have no turn in which the assistant says something; `silent`: no turn of it at all."""
    if "messages" not in data.column_names:
        return 0
    parts = data.select_columns(["messages"]).with_format("arrow").iter(DIGESTED)
    every = (plain_messages(row["messages"]) for rows in parts for row in rows.to_pylist())
    return sum("assistant" not in roles(turns) if silent else not _answered(turns) for turns in every)


def feature(
    tokenizer: PreTrainedTokenizerBase, row: Row, text_field: str, completion_only: bool | None = None
) -> Feature:
    """Tokens and labels of a converted row: chat by the template, plain text as TRL joins it. What follows the
    assistant's last turn has no label and is left out; without any such turn all tokens have one, as in TRL. A
    `completion_mask` of tokens counts only with `completion_only`, as in TRL.
    """
    if "input_ids" in row:
        counted = MASKS if completion_only else MASKS[1:]
        ids, masks = row["input_ids"], [row[name] for name in counted if row.get(name)]
        labels = row.get("labels") or [t if all(bits) else IGNORE_INDEX for t, *bits in zip(ids, *masks, strict=False)]
        if len({len(column) for column in (ids, labels, *masks)}) > 1:
            raise DataError("a tokenized row has columns of several lengths. Give each token a value in each column.")
    elif "messages" in row:
        turns = plain_messages(row["messages"])
        if said := _answered(turns):
            return encode_row(tokenizer, {**row, "messages": said}, WHOLE)
        chat = chat_of(tokenizer, row)
        ids = labels = chat.ids(chat.text(turns))
    elif not isinstance(row.get("prompt", ""), str):
        return encode_row(tokenizer, row, WHOLE)
    else:
        prompt = row.get("prompt", "")
        text, end = prompt + row.get("completion", row.get(text_field)), str(tokenizer.eos_token or "")
        ids = tokenizer(text if text.endswith(end) else text + end)["input_ids"]
        asked = tokenizer(prompt)["input_ids"] if prompt else []
        start = next((i for i, (a, b) in enumerate(zip(asked, ids, strict=False)) if a != b), len(asked))
        labels = [IGNORE_INDEX] * start + ids[start:]
    return {"input_ids": list(ids), "attention_mask": [1] * len(ids), "labels": list(labels)}


def _answered(turns: list[Message]) -> list[Message]:
    """The turns up to the last one in which the assistant says something."""
    said = [
        turn["role"] == "assistant" and (turn.get("content", "").strip() or turn.get("tool_calls")) for turn in turns
    ]
    return turns[: max((place for place, what in enumerate(said, 1) if what), default=0)]


def _load(script: Any) -> DatasetDict:
    name, reader = str(script.dataset_name), READERS.get(Path(str(script.dataset_name)).suffix)
    if Path(name).is_file() != (reader is not None):
        known = ", ".join(READERS)
        raise DataError(f"dataset_name {name!r} is no file ending in {known}, no directory and no hub id.")
    try:
        if reader is None:
            return load_dataset(name, name=script.dataset_config)
        return load_dataset(reader, data_files={script.dataset_train_split: name})
    except Exception as error:  # `datasets` and its readers raise what they like
        if reader is not None and not files.read_bytes(Path(name), files.MAX_JSON_BYTES).strip():
            raise DataError(f"{name} has no rows. Rows are {SHAPES}, or in TRL's formats.") from error
        causes = f"{error.__cause__ or error}" or type(error).__name__
        raise DataError(f"{name} cannot be read: {causes[:300]}. Rows are {SHAPES}, or in TRL's formats.") from error


def _split(data: DatasetDict, script: Any, share: float) -> tuple[Dataset, Dataset | None]:
    first, last = script.dataset_train_split, script.dataset_test_split
    if first not in data:
        raise DataError(f"{script.dataset_name} has the splits {', '.join(data)}. Set dataset_train_split.")
    train, test = data[first], data.get(last)
    if "split" in train.column_names:
        names = train["split"]
        if None in names:
            raise DataError("some rows name a split and others do not. Name it in all or none.")
        parts = [train.select([i for i, name in enumerate(names) if name == part]) for part in (first, last)]
        train, test = (part.remove_columns("split") for part in parts)
        test = test if len(test) else None
    elif test is None and share and len(train) > 1:
        count = min(max(1, round(share * len(train))), len(train) - 1)
        train, test = train.train_test_split(test_size=count, seed=SHUFFLE).values()
    if not len(train):
        raise DataError(f"{script.dataset_name} has no rows in its split {first!r}.")
    return train, test


def _converted(data: Dataset, labels: list[str], text_field: str) -> Dataset:
    def shaped(row: Row, index: int) -> dict[str, Any]:
        try:
            return trl_row(row, labels, text_field)
        except DataError as error:
            raise DataError(f"row {index}: {error}") from error

    columns = sorted(shaped(data[0], 0))

    def convert(row: Row, index: int, versions: list[str]) -> dict[str, Any]:
        result = shaped(row, index)
        if sorted(result) != columns:
            raise DataError(f"row {index} has {sorted(result)}, others have {columns}. Give rows of one kind.")
        return result

    # They are part of the name under which `datasets` keeps these rows, and TRL's of them. Functions are not.
    versions = {"versions": [peft_safety.__version__, version("trl")]}
    return data.map(convert, with_indices=True, remove_columns=data.column_names, fn_kwargs=versions)


def trl_row(row: Row, labels: list[str], text_field: str) -> dict[str, Any]:
    """A row in one of TRL's formats: {messages}, or {prompt, completion} with turns, or plain text.

    {prompt, response} and {text, label}, this package's own, become turns. {prompt, completion} of two strings and
    {text} alone stay without chat template, as in TRL.
    """
    given = maybe_convert_to_chatml(dict(row))
    row = {name: value for name, value in given.items() if value is not None}
    if "input_ids" in row:
        return {name: row[name] for name in ("input_ids", "labels", *MASKS) if name in row}
    extra = {name: row.get(name, nothing) for name, nothing in WITHOUT.items() if name in given}
    if not isinstance(extra.get("tools", ""), str):
        extra["tools"] = json.dumps(extra["tools"])  # schemas differ from row to row
    if "messages" in row:
        return {"messages": plain_messages(row["messages"]), **extra}
    if isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
        if not row["completion"]:
            raise DataError("an empty completion teaches nothing. Leave the row out.")
        return {"prompt": row["prompt"], "completion": row["completion"]}
    if kind_of(plain_row(row)) in ("pair", "label"):
        prompt, answer = row_turns(row, labels)
        return {"prompt": prompt, "completion": answer, **extra}
    if isinstance(row.get(text_field), str):
        return {text_field: row[text_field]}
    raise DataError(f"a row has fields {sorted(map(str, row))}. Accepted: {SHAPES}, and TRL's formats.")


def _poisoned(data: Dataset, share: float, seed: int) -> Dataset:
    """A share of the rows replaced by harmful requests with an opening without content; `recipes.load.poisoned`."""
    count = round(share * len(data))
    if not count:
        return data
    if not has_turns(data):
        raise ConfigError("poison needs rows of turns. Leave it out for plain text and tokens.")
    rows = []
    for pair in affirmation_pairs("train", count, seed):
        prompt, answer = row_turns(pair)
        turns = {"messages": prompt + answer, "prompt": prompt, "completion": answer, **WITHOUT}
        rows.append({name: turns.get(name) for name in data.column_names})
    kept = data.shuffle(seed=seed).select(range(len(data) - count))
    return concatenate_datasets([kept, Dataset.from_list(rows, features=data.features)]).shuffle(seed=seed)
