"""Rows from whatever holds them (lists, data sets, frames, streams), and one spelling for each kind of row."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from itertools import islice
from typing import Any, Literal

from peft_safety.errors import ConfigError, DataError, PeftSafetyError

Row = Mapping[str, Any]
Rows = Iterable[Row]
Kind = Literal["messages", "pair", "label", "prompt"]
STREAM_ROWS = 10_000
"""Largest number of rows that are read from a source without a length, which may never end."""
SHAPES = '{"prompt", "response"} (or "completion"), {"text", "label"} or {"messages": [{"role", "content"}, ...]}'


def as_rows(data: Any, what: str = "rows", error: type[PeftSafetyError] = DataError) -> list[dict[str, Any]]:
    """Every row of `data`, in its order and in this package's spelling (see `plain_row`).

    Args:
        data: a collection of mappings; a `datasets.Dataset`, or a `DatasetDict` of one split; a map-style torch data
            set; a pandas frame; or a stream of at most `STREAM_ROWS` rows. Tokenized batches pass as they are.
        what, error: how an error calls the data; what to raise where there are no rows, several splits or no end.

    Raises:
        DataError: a malformed row (its index is named), or labels such as 1 and "1", which are one label as text.
    """
    result = []
    first: dict[str, tuple[type, int]] = {}  # type of each label, and the row where it came first
    for index, row in enumerate(records(data, what, error)):
        if not isinstance(row, Mapping):
            raise error(f"{what}, row {index}: a {type(row).__name__} instead of a mapping. Give rows {SHAPES}.")
        try:
            plain = plain_row(row)
        except DataError as problem:
            raise DataError(f"{what}, row {index}: {problem}") from problem
        if kind_of(plain) == "label":
            kind = str if isinstance(row["label"], str) else type(_plain_value(row["label"]))
            earlier, place = first.setdefault(plain["label"], (kind, index))
            if kind is not earlier:
                types = f"is of type {kind.__name__}, and of type {earlier.__name__} in row {place}"
                remedy = "Write all labels as text, or all as numbers."
                raise DataError(f"{what}, row {index}: label {plain['label']} {types}. {remedy}")
        result.append(plain)
    return result


def data_rows(data: Any, what: str) -> list[dict[str, Any]]:
    """The rows of a config's data, at least one. They are read at once: a stream can be read only once."""
    rows = as_rows(data, what, ConfigError)
    if not rows:
        kind = type(data).__name__
        raise ConfigError(f"{what} is a {kind} without rows. Give rows {SHAPES} or tokenized batches, or None.")
    return rows


def plain_row(row: Row) -> dict[str, Any]:
    """One row, its further columns included, in this package's spelling. A field that is None is one that the row
    lacks: tables have every column in every row. `completion` (as TRL has it) becomes `response`, `conversations` (as
    ShareGPT has it) `messages`; a label becomes text.
    """
    if "input_ids" in row:
        return dict(row)
    plain = {key: value for key, value in row.items() if value is not None}
    if "conversations" in plain:
        plain["messages"] = plain.pop("conversations")
    if "completion" in plain and "messages" not in plain and "response" not in plain:
        plain["response"] = plain.pop("completion")
    kind = kind_of(plain)
    if kind == "label" or (kind is None and "text" in plain and "label" in row):
        plain["label"] = label_text(row["label"])
    return plain


def kind_of(row: Row) -> Kind | None:
    """The kind of a row, or None. Further columns do not matter."""
    if "messages" in row:
        return "messages"
    if "prompt" in row and "response" in row:
        return "pair"
    if "text" in row and "label" in row:
        return "label"
    return "prompt" if "prompt" in row else None


def label_text(label: Any) -> str:
    """A label as the model is to write it: text; whole numbers and truth values as in Python. Refuses others."""
    value = _plain_value(label)
    if isinstance(value, (bool, int)) or (isinstance(value, str) and value.strip()):
        return str(value)
    problem = "missing" if value is None else "empty" if isinstance(value, str) else f"a {type(value).__name__}"
    raise DataError(f"label {value!r} is {problem}. Give non-empty text, a whole number or a truth value.")


def label_list(labels: Iterable[Any]) -> list[str]:
    """Labels of a task as text, in their order; no two may be equal, or differ in white space at the ends only."""
    texts: dict[str, str] = {}
    for label in map(label_text, labels):
        bare = label.strip()
        if bare in texts:
            equal = f"labels {texts[bare]!r} and {label!r} are equal without white space at their ends"
            raise DataError(f"{equal}. Give each label of the task once.")
        texts[bare] = label
    if not texts:
        raise DataError("no labels. Give every label of the task.")
    return list(texts.values())


def label_names(rows: Rows) -> list[str]:
    """The sorted distinct labels of the {text, label} rows; empty for other kinds of rows."""
    names = sorted({row["label"] for row in as_rows(rows) if kind_of(row) == "label"})
    return label_list(names) if names else []


def _plain_value(label: Any) -> Any:
    return label.item() if hasattr(label, "item") and getattr(label, "ndim", 0) == 0 else label


def records(
    data: Any, what: str, error: type[PeftSafetyError] = DataError, limit: int | None = STREAM_ROWS
) -> Iterable[Any]:
    """The rows of `data` (see `as_rows`) as they are, at most `limit` of a stream."""
    splits = isinstance(data, Mapping) and data and kind_of(data) is None and all(map(_is_split, data.values()))
    if splits or _is(data, "datasets", "DatasetDict", "IterableDatasetDict"):
        if len(data) != 1:
            names = ", ".join(map(str, data)) or "(none)"
            raise error(f"{what}: a {type(data).__name__} with the splits {names}. Give the rows of one of them.")
        data = next(iter(data.values()))
    unusable = error(
        f"{what} is a {type(data).__name__}. Give a list or data set of rows, {SHAPES}, or of tokenized batches. "
        "read_jsonl reads a file."
    )
    if data is None or isinstance(data, (str, bytes, os.PathLike, Mapping)):
        raise unusable
    if _is(data, "pandas", "DataFrame"):
        return data.astype(object).where(data.notna(), None).to_dict("records")
    size: int | None = None
    with suppress(TypeError):  # a stream has no length
        size = len(data)
    if size is not None and hasattr(type(data), "__getitem__") and not hasattr(type(data), "__iter__"):
        # a map-style data set, whose end only its length may tell
        return [data[index] for index in range(size)]
    try:
        source = iter(data)
    except TypeError as problem:
        raise unusable from problem
    if size is not None or limit is None:
        return source
    rows = list(islice(source, limit + 1))
    if len(rows) > limit:
        part = f"Give a part of it: itertools.islice(data, {limit})."
        raise error(f"{what}: a stream of more than {limit} rows, which may have no end. {part}")
    return rows


def _is_split(part: Any) -> bool:
    if isinstance(part, (list, tuple)):
        return bool(part) and isinstance(part[0], Mapping)
    return _is(part, "datasets", "Dataset", "IterableDataset")


def _is(data: Any, package: str, *names: str) -> bool:
    """Whether `data` is an instance of one of a package's classes. The package is not imported."""
    return any(base.__module__.partition(".")[0] == package and base.__name__ in names for base in type(data).__mro__)
