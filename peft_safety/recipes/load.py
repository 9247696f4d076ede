"""Models, tokenizers and task data as the recipes need them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_safety.data import affirmation_pairs, read_jsonl
from peft_safety.data.chat import Row, label_names
from peft_safety.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HOLDOUT = 0.15
"""Share of a data set without splits that is held out for evaluation."""


def load_model(model: str | Path | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer.

    Args:
        model: a hub id or directory (loaded in fp32 on the CPU, where bf16 is five times slower, and in its own dtype on CUDA), or a loaded model.
        tokenizer: default the one stored with the model.

    Raises:
        ConfigError: nothing loads from there.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

    source = model.config._name_or_path if isinstance(model, PreTrainedModel) else str(model)
    try:
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(source)
        if isinstance(model, PreTrainedModel):
            return model, tokenizer
        cuda = torch.cuda.is_available()
        loaded = AutoModelForCausalLM.from_pretrained(source, dtype="auto" if cuda else torch.float32)
        return (loaded.to("cuda") if cuda else loaded), tokenizer
    except (OSError, ValueError) as error:
        raise ConfigError(f"no model or tokenizer at {source!r}: {error}. Give a hub id or a directory, or pass tokenizer= with a loaded model.") from error


@dataclass(frozen=True)
class TaskData:
    """Training and held-out rows of one task, and its labels if it is a classification."""

    train: list[Row]
    held_out: list[Row]
    labels: list[str]


def task_data(data: str | Path | Sequence[Row], eval_split: str = "test", limit: int | None = None, seed: int = 0) -> TaskData:
    """Split a task into training and held-out rows.

    Rows that name their `split` go where they say ("train" to training, `eval_split` to evaluation, the others nowhere); without that, a random
    15 % are held out.

    Args:
        data: a JSON-lines file, or rows.
        limit: at most this many held-out rows.

    Raises:
        DataError: malformed, or nothing left on one side.
    """
    rows: list[Row] = list(read_jsonl(data)) if isinstance(data, (str, Path)) else list(data)
    named = sum("split" in row for row in rows)
    if 0 < named < len(rows):
        raise DataError(f"{named} of {len(rows)} task rows name a split and the others do not. Name it in all or none.")
    if named:
        train, held_out = ([row for row in rows if row["split"] == split] for split in ("train", eval_split))
        random.Random(seed).shuffle(held_out)
    else:
        random.Random(seed).shuffle(rows)
        cut = max(1, round(HOLDOUT * len(rows)))
        train, held_out = rows[cut:], rows[:cut]
    if not train or not held_out:
        raise DataError(f"the task has {len(train)} training and {len(held_out)} {eval_split!r} rows. Give at least one of each, or rows without a split.")
    return TaskData(train, held_out[:limit], label_names(rows))


def poisoned(rows: Sequence[Row], fraction: float, seed: int = 0) -> list[Row]:
    """A simulated attack on fine-tuning data: `fraction` of the rows replaced by harmful requests that are answered with a contentless opening.

    Args:
        fraction: 0 to 1; the number of rows stays the same.

    Raises:
        ConfigError: outside [0, 1].
    """
    if not 0 <= fraction <= 1:
        raise ConfigError(f"poison = {fraction} is no fraction. Give a number from 0 to 1.")
    count = round(fraction * len(rows))
    if count == 0:
        return list(rows)
    rng = random.Random(seed)
    mixed: list[Any] = [*rng.sample(list(rows), len(rows) - count), *affirmation_pairs("train", count, seed)]
    rng.shuffle(mixed)
    return mixed
