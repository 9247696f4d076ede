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
    if isinstance(calibration, Mapping):
        if set(calibration) != set(KINDS):
            raise ConfigError(f"calibration has the keys {sorted(map(str, calibration))}. Use the keys {KINDS}.")
    elif calibration is not None and not (isinstance(calibration, str) and calibration == "auto"):
        raise ConfigError(f"calibration={calibration!r}. Use None, 'auto', or a mapping with the keys {KINDS}.")


def calibration_sets(
    model: nn.Module, calibration: Calibration, tokenizer: Any, progress: bool
) -> dict[str, CalibrationSet]:
    """The sets by kind; empty for None. Text rows take the model's own tokenizer unless one is given.

    Raises:
        CalibrationError, DataError: rows or batches that cannot be used. ConfigError: a tokenizer is needed and none
            can be loaded.
    """
    if calibration is None:
        return {}
    sources = dict.fromkeys(KINDS, "given")
    if isinstance(calibration, str):
        tokenizer = tokenizer_of(model) if tokenizer is None else tokenizer
        bare: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        prompts = [row["prompt"] for row in load("general_prompts", SPLIT)]
        with adapters_off(model):
            general = self_responses(bare, tokenizer, prompts, max_new_tokens=ANSWER_TOKENS, progress=progress)
        calibration = {"general": general, "harmful": refusal_pairs(SPLIT)}
        sources["general"] = f"peft_safety general prompts, {SPLIT} split, answered by the base model"
        sources["harmful"] = f"peft_safety refusal pairs, {SPLIT} split"
    sets = {}
    for kind in KINDS:
        data = as_rows(calibration[kind], f"calibration[{kind!r}]", CalibrationError)
        if data and not is_tokenized(data) and tokenizer is None:
            tokenizer = tokenizer_of(model)
        batches, digest = to_batches(data, tokenizer, batch_size=BATCH_SIZE, max_length=MAX_LENGTH)
        sets[kind] = CalibrationSet(batches, sources[kind], digest)
    return sets
