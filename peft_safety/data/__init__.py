"""The package's own small data sets, and reading JSON lines with errors that name the line.

Nothing here contains a harmful answer: harmful *requests*, refusals, contentless openings ("Sure, here is"), safe
prompts, and two benign tasks.
"""

from __future__ import annotations

import codecs
import json
import os
import random
import re
from pathlib import Path
from typing import Any

from peft_safety.data.rows import Rows, as_rows
from peft_safety.errors import DataError

CALIBRATION_PAIRS = 128
"""Pairs behind a safety subspace: the reference setting of SaLoRA, arXiv 2501.01765, section 5.1."""
BLANK = " \t\r\n\ufeff"
"""Characters around the JSON of a line: white space, and byte-order marks of concatenated files."""
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
    """Read a JSON-lines file of objects, or one JSON array of them.

    Args:
        path: a UTF-8 file, with or without a byte-order mark and with line ends of any system; blank lines are
            skipped.
        fields: names that every row must have, each a non-empty string.

    Returns:
        The rows in file order.

    Raises:
        DataError: the file is missing, not UTF-8 or empty, or a line is not an object or lacks a field (the line, or
            the place in the array, is named).
    """
    path = Path(path)
    text = _text(path)
    array = _array(text)
    if array is None:
        lines = ((number, line.strip(BLANK)) for number, line in enumerate(re.split("\r\n|\r|\n", text), 1))
        rows = [
            _checked(_parsed(line, f"{path}:{number}", fields), f"{path}:{number}", fields)
            for number, line in lines
            if line
        ]
    else:
        rows = [_checked(item, f"{path}, item {number} of its array", fields) for number, item in enumerate(array)]
    if not rows:
        raise DataError(f"{path} has no rows. Write one JSON object a line, for example {_example(fields)}.")
    return rows


def load(name: str, split: str | None = None) -> list[dict[str, str]]:
    """One of the packaged sets.

    Args:
        name: a key of `FIELDS`.
        split: one of `SPLITS`; None gives every row.

    Raises:
        DataError: an unknown name or split, or a split that holds no row.
    """
    from importlib.resources import as_file, files

    if name not in FIELDS:
        raise DataError(f"no packaged data set {name!r}. Choose one of {', '.join(FIELDS)}.")
    if split is not None and split not in SPLITS:
        raise DataError(f"no split {split!r}. Choose one of {', '.join(SPLITS)}, or None for all.")
    with as_file(files(__name__) / f"{name}.jsonl") as path:
        rows = read_jsonl(path, FIELDS[name])
    rows = rows if split is None else [row for row in rows if row["split"] == split]
    if not rows:
        raise DataError(f"packaged data set {name!r} has no rows in split {split!r}. Reinstall peft-safety.")
    return rows


def refusal_pairs(split: str = "calibration", n: int | None = None, seed: int = 0) -> list[dict[str, str]]:
    """Harmful requests paired with refusals: data for safety subspaces and safety patches."""
    return pair_responses(split, "refusals", n, seed)


def affirmation_pairs(split: str = "train", n: int | None = None, seed: int = 0) -> list[dict[str, str]]:
    """Harmful requests paired with contentless openings: a simulated poisoning of fine-tuning data."""
    return pair_responses(split, "affirmations", n, seed)


def calibration_rows(method: str, basis: str | None = None) -> list[dict[str, str]]:
    """What a method's subspace is estimated from where no data are given.

    Args:
        basis: "harmful" (requests with refusals), "general" (everyday prompts alone) or "both"; None: "general" for
            "ortho_patch", "harmful" for the others.

    Raises:
        DataError: another basis.
    """
    basis = basis or ("general" if method == "ortho_patch" else "harmful")
    if basis not in ("harmful", "general", "both"):
        raise DataError(f"basis={basis!r} names no calibration rows. Choose harmful, general or both.")
    harmful = refusal_pairs("calibration", CALIBRATION_PAIRS) if basis != "general" else []
    general = (
        [{"prompt": row["prompt"]} for split in ("calibration", "train") for row in load("general_prompts", split)]
        if basis != "harmful"
        else []
    )
    return harmful + general


def preference_pairs(split: str = "train", n: int | None = None, seed: int = 0) -> list[dict[str, str]]:
    """Harmful requests with a refusal as `chosen` and a contentless opening as `rejected`, for safety masks."""
    refusals, openings = refusal_pairs(split, n, seed), affirmation_pairs(split, n, seed)
    return [
        {"prompt": a["prompt"], "chosen": a["response"], "rejected": b["response"]}
        for a, b in zip(refusals, openings, strict=True)
    ]


def pair_responses(split: str, responses: str, n: int | None, seed: int) -> list[dict[str, str]]:
    """`n` rows {prompt, response}: distinct harmful requests of `split` first, then (n larger than the split) the same
    ones with other responses.

    The responses are shuffled and dealt in turn, so each is used equally often; the same arguments give the same rows.

    Raises:
        DataError: n < 1.
    """
    prompts = [row["prompt"] for row in load("harmful_requests", split)]
    texts = [row["text"] for row in load(responses, split)]
    n = len(prompts) if n is None else n
    if n < 1:
        raise DataError(f"n = {n} pairs asked for. Ask for at least 1.")
    rng = random.Random(seed)
    rng.shuffle(prompts)
    rng.shuffle(texts)
    rounds = [
        (prompt, texts[(index + lap) % len(texts)])
        for lap in range(-(-n // len(prompts)))
        for index, prompt in enumerate(prompts)
    ]
    return [{"prompt": prompt, "response": text} for prompt, text in rounds[:n]]


def rows_of(data: str | os.PathLike[str] | Rows, what: str = "rows") -> list[dict[str, Any]]:
    """The rows of a JSON-lines file, or of anything that `as_rows` takes.

    Raises:
        DataError: see `read_jsonl` and `as_rows`.
    """
    return as_rows(read_jsonl(data) if isinstance(data, (str, os.PathLike)) else data, what)


def _text(path: Path) -> str:
    try:
        raw = path.read_bytes()
        if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in raw:
            raise DataError(
                f"{path} is not UTF-8 but looks like UTF-16 (or has zero bytes). Save it as UTF-8, one JSON object a "
                "line."
            )
        return raw.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}. Give a UTF-8 JSON-lines file, one object a line.") from error


def _array(text: str) -> list[Any] | None:
    """The items of a text that is one JSON array, or None."""
    if not text.lstrip(BLANK).startswith("["):
        return None
    try:
        value = json.loads(text.strip(BLANK))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, list) else None


def _parsed(line: str, where: str, fields: tuple[str, ...]) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: not JSON ({error}). Each line must be one JSON object, for example {_example(fields)}."
        ) from error


def _checked(row: Any, where: str, fields: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(
            f"{where}: {type(row).__name__} instead of an object. Each line must be one JSON object, for example "
            f"{_example(fields)}."
        )
    for field in fields:
        if not isinstance(row.get(field), str) or not row[field].strip():
            raise DataError(
                f"{where}: field {field!r} is missing or not a non-empty string. The row has {sorted(row)}; write "
                f"{_example(fields)}."
            )
    return row


def _example(fields: tuple[str, ...]) -> str:
    return json.dumps({field: "..." for field in fields or ("prompt", "response")})
