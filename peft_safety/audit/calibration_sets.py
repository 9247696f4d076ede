"""Calibration data of an audit: general and harmful prompts with answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from peft_safety.calibration.activations import adapters_off, tokenizer_of
from peft_safety.calibration.moments import Batch, Positions, is_tokenized, to_batches
from peft_safety.data import load, refusal_pairs
from peft_safety.data.rows import Rows, as_rows
from peft_safety.errors import CalibrationError, ConfigError
from peft_safety.evaluation import self_responses

Calibration = Literal["auto"] | Mapping[str, Rows] | None
KINDS = ("general", "harmful")
SPLIT = "calibration"
ANSWER_TOKENS = 24
"""Tokens of the model's own answers to the general prompts, as in this package's benchmark."""
BATCH_SIZE = 8
MAX_LENGTH = 512


@dataclass(frozen=True)
class CalibrationSet:
    """Batches of one kind, their source, and a hash of their content."""

    batches: list[Batch]
    source: str
    digest: str


def check_request(calibration: Calibration, positions: Positions) -> None:
    """Refuse a malformed request before any work is done.

    Raises:
        ConfigError: see `orthogonality_report`.
    """
    if positions not in ("response", "prompt", "all"):
        raise ConfigError(f"positions={positions!r}. Use 'response', 'prompt' or 'all'.")
    if calibration is None or (isinstance(calibration, str) and calibration == "auto"):
        return
    if not isinstance(calibration, Mapping) or set(calibration) != set(KINDS):
        given = sorted(map(str, calibration)) if isinstance(calibration, Mapping) else repr(calibration)
        raise ConfigError(f"calibration={given}. Use None, 'auto', or a mapping with the keys {KINDS}.")


def calibration_sets(
    model: nn.Module, calibration: Calibration, tokenizer: Any, progress: bool
) -> dict[str, CalibrationSet]:
    """The sets by kind; empty for None. Text rows take the model's own tokenizer unless one is given.

    Raises:
        CalibrationError, DataError: rows or batches that cannot be used. ConfigError: a tokenizer is needed and none
            is found.
    """
    if calibration is None:
        return {}
    if isinstance(calibration, str):
        tokenizer = tokenizer_of(model) if tokenizer is None else tokenizer
        rows: Mapping[str, Rows] = _package_rows(model, tokenizer, progress)
        sources = {
            "general": f"peft_safety general prompts, {SPLIT} split, answered by the base model",
            "harmful": f"peft_safety refusal pairs, {SPLIT} split",
        }
    else:
        rows, sources = calibration, dict.fromkeys(KINDS, "given")
    sets = {}
    for kind in KINDS:
        data = as_rows(rows[kind], f"calibration[{kind!r}]", CalibrationError)
        if data and not is_tokenized(data) and tokenizer is None:
            tokenizer = tokenizer_of(model)
        batches, digest = to_batches(data, tokenizer, batch_size=BATCH_SIZE, max_length=MAX_LENGTH)
        sets[kind] = CalibrationSet(batches, sources[kind], digest)
    return sets


def _package_rows(model: nn.Module, tokenizer: Any, progress: bool) -> dict[str, Rows]:
    """General prompts with the base model's own greedy answers, harmful requests with refusals."""
    prompts = [row["prompt"] for row in load("general_prompts", SPLIT)]
    bare: Any = model
    if hasattr(model, "get_base_model"):
        bare = bare.get_base_model()
    with adapters_off(model):
        general = self_responses(bare, tokenizer, prompts, max_new_tokens=ANSWER_TOKENS, progress=progress)
    return {"general": general, "harmful": refusal_pairs(SPLIT)}
