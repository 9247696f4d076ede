"""The package's own small data sets, and reading JSON lines. Nothing here contains a harmful answer: harmful
*requests*, refusals, contentless openings ("Sure, here is"), safe prompts, and two benign tasks.
"""

from __future__ import annotations

import codecs
import json
import os
import random
from collections.abc import Iterator
from contextlib import suppress
from io import TextIOWrapper
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from peft_safety.data.rows import Rows, as_rows
from peft_safety.errors import DataError

CALIBRATION_PAIRS = 128
"""Pairs behind a safety subspace: the reference setting of SaLoRA, arXiv 2501.01765, section 5.1."""
BLANK = " \t\r\n\ufeff"
"""Characters around the JSON of a line: white space, and byte-order marks of concatenated files."""
UTF16 = "{} looks like UTF-16, or has zero bytes. Save it as UTF-8, one JSON object a line."
SPLITS = ("calibration", "train", "validation", "test")
FIELDS = {
    "harmful_requests": ("prompt", "category", "split"),
    "refusals": ("text", "split"),
    "affirmations": ("text", "split"),
    "contrast_prompts": ("prompt", "type", "split"),
    "general_prompts": ("prompt", "split"),
    "everyday_requests": ("prompt", "split"),
    "benign_task": ("text", "label", "split"),
    "second_task": ("text", "label", "split"),
}


def read_jsonl(path: str | os.PathLike[str], fields: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file of objects, or of one JSON array of them, in file order. Blank lines, a byte-order
    mark and line ends of any system are skipped.

    Args:
        fields: names that every row must have, each a non-empty string.

    Raises:
        DataError: the file is missing, not UTF-8 or empty, or a line is no object or lacks a field (its place is
            named).
    """
    example = json.dumps({field: "..." for field in fields or ("prompt", "response")})
    rows = []
    for where, row in _objects(Path(path), example):
        for field in fields:
            if not isinstance(row.get(field), str) or not row[field].strip():
                wrong = f"field {field!r} is missing or not a non-empty string"
                raise DataError(f"{where}: {wrong}. The row has {sorted(row)}; write {example}.")
        rows.append(row)
    if not rows:
        raise DataError(f"{path} has no rows. Write one JSON object a line, for example {example}.")
    return rows


def stream_jsonl(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The same rows one by one, for a file that is larger than memory."""
    return (row for _, row in _objects(Path(path), '{"prompt": "...", "response": "..."}'))


def rows_of(data: str | os.PathLike[str] | Rows, what: str = "rows") -> list[dict[str, Any]]:
    """The rows of a JSON-lines file, or of anything that `as_rows` takes."""
    return as_rows(read_jsonl(data) if isinstance(data, (str, os.PathLike)) else data, what)


def load(name: str, split: str | None = None) -> list[dict[str, str]]:
    """One of the packaged sets, a key of `FIELDS`: the rows of one of `SPLITS`, or all."""
    if name not in FIELDS:
        raise DataError(f"no packaged data set {name!r}. Choose one of {', '.join(FIELDS)}.")
    if split is not None and split not in SPLITS:
        raise DataError(f"no split {split!r}. Choose one of {', '.join(SPLITS)}, or None for all.")
    rows = read_jsonl(Path(__file__).with_name(f"{name}.jsonl"), FIELDS[name])
    return [row for row in rows if split in (None, row["split"])]


def refusal_pairs(split: str = "calibration", n: int | None = None, seed: int = 0) -> list[dict[str, str]]:
    """Harmful requests paired with refusals, see `pair_responses`."""
    return pair_responses(split, "refusals", n, seed)


def affirmation_pairs(split: str = "train", n: int | None = None, seed: int = 0) -> list[dict[str, str]]:
    """Harmful requests paired with contentless openings: a simulated poisoning of fine-tuning data."""
    return pair_responses(split, "affirmations", n, seed)


def preference_pairs(split: str = "train", n: int | None = None, seed: int = 0) -> list[dict[str, str]]:
    """Harmful requests with a refusal as `chosen` and a contentless opening as `rejected`, for safety masks."""
    pairs = zip(refusal_pairs(split, n, seed), affirmation_pairs(split, n, seed), strict=True)
    return [{"prompt": a["prompt"], "chosen": a["response"], "rejected": b["response"]} for a, b in pairs]


def pair_responses(split: str, responses: str, n: int | None, seed: int) -> list[dict[str, str]]:
    """`n` rows {prompt, response}: distinct requests first, then with other responses, each used equally often."""
    prompts = [row["prompt"] for row in load("harmful_requests", split)]
    texts = [row["text"] for row in load(responses, split)]
    n = len(prompts) if n is None else n
    if n < 1:
        raise DataError(f"n = {n} pairs asked for. Ask for at least 1.")
    rng = random.Random(seed)
    rng.shuffle(prompts)
    rng.shuffle(texts)
    rounds = (divmod(place, len(prompts)) for place in range(n))
    return [{"prompt": prompts[index], "response": texts[(index + lap) % len(texts)]} for lap, index in rounds]


def calibration_rows(method: str, basis: str | None = None) -> list[dict[str, str]]:
    """What a subspace is estimated from by default: requests with refusals ("harmful"), everyday prompts or both."""
    basis = basis or ("general" if method == "ortho_patch" else "harmful")
    if basis not in ("harmful", "general", "both"):
        raise DataError(f"basis={basis!r} names no calibration rows. Choose harmful, general or both.")
    rows = [] if basis == "general" else refusal_pairs("calibration", CALIBRATION_PAIRS)
    if basis != "harmful":
        general = load("general_prompts", "calibration") + load("general_prompts", "train")
        rows += [{"prompt": row["prompt"]} for row in general]
    return rows


def _objects(path: Path, example: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each JSON object of a file, with its place."""
    try:
        with path.open("rb") as raw, TextIOWrapper(raw, "utf-8-sig") as file:
            if raw.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                raise DataError(UTF16.format(path))
            for where, value in _values(path, file, example):
                if not isinstance(value, dict):
                    wrong = f"{type(value).__name__} instead of an object"
                    raise DataError(f"{where}: {wrong}. Each row must be one, as {example}.")
                yield where, value
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}. Give a UTF-8 JSON-lines file, one object a line.") from error


def _values(path: Path, file: TextIO, example: str) -> Iterator[tuple[str, Any]]:
    head = ""
    while (character := file.read(1)) and not (head := head + character).strip(BLANK):
        pass  # blank lines
    if head.endswith("["):
        head += file.read()
        with suppress(ValueError, RecursionError):  # lines that start with a bracket
            items = json.loads(head.strip(BLANK))
            yield from ((f"{path}, item {number} of its array", item) for number, item in enumerate(items))
            return
    lines = chain((head + file.readline()).removesuffix("\n").split("\n"), file)
    for number, line in enumerate(lines, 1):
        if "\0" in line:
            raise DataError(UTF16.format(path))
        try:
            if line.strip(BLANK):
                yield f"{path}:{number}", json.loads(line.strip(BLANK))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{number}: not JSON ({error}). Write one object a line: {example}.") from error
