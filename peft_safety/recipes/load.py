"""Models, tokenizers and task data as the recipes need them."""

from __future__ import annotations

import random
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from peft_safety.core.adapter_dir import protected_types
from peft_safety.core.base_weights import nf4_config
from peft_safety.core.missing import not_found
from peft_safety.core.names import exclude_look_alikes, pin, places
from peft_safety.core.plain_lora import read_manifest, read_plain
from peft_safety.core.snapshot import reading
from peft_safety.core.training import HOLDOUT
from peft_safety.data import affirmation_pairs, rows_of
from peft_safety.data.rows import Row, Rows, as_rows, label_names
from peft_safety.errors import ArtifactError, ConfigError, DataError, PeftSafetyError, extra


def load_model(
    model: str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    load_in_4bit: bool = False,
    stream: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer.

    Args:
        model: a loaded model, or a hub id or directory, loaded in fp32 on the CPU (where bf16 is five times slower),
            in its own dtype on CUDA.
        tokenizer: default the one stored with the model.
        load_in_4bit: quantize to NF4, double quantization included, on the way in.
        stream: leave the blocks in the checkpoint's safetensors files; every forward reads one layer after the other.
    """
    source = model.config._name_or_path if isinstance(model, PreTrainedModel) else str(model)
    cuda = torch.cuda.is_available()
    options: dict[str, Any] = {"dtype": "auto" if cuda else torch.float32}
    if load_in_4bit:
        with extra("quant", "a 4-bit base needs bitsandbytes"):
            import bitsandbytes  # noqa: F401
        options["dtype"] = torch.bfloat16 if cuda else torch.float32
        options["quantization_config"] = nf4_config(options["dtype"])
    try:
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(source)
        if isinstance(model, PreTrainedModel):
            return model, tokenizer
        if stream:
            options["device_map"] = _blocks_on_disk(source, "cuda:0" if cuda else "cpu")
        loaded = AutoModelForCausalLM.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        if isinstance(model, PreTrainedModel):
            raise ConfigError(f"no tokenizer at {source!r}: {error}. Pass tokenizer= with a loaded model.") from error
        raise ConfigError(not_found("model or tokenizer", source, error)) from error
    return (loaded.to("cuda") if cuda and not load_in_4bit and not stream else loaded), tokenizer


def _blocks_on_disk(source: str, device: str) -> dict[str, str]:
    """A device map: lists of modules, which are the blocks, stay on disk; everything else goes to the device."""
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
    result: dict[str, str] = {}
    for name, module in empty.named_modules():
        if any(name.startswith(f"{other}.") for other, place in result.items() if place == "disk"):
            continue
        if isinstance(module, torch.nn.ModuleList):
            result[name] = "disk"
        elif module._parameters or module._buffers:
            result[name] = device
    return result


def load_adapter(
    directory: str | Path, model: str | Path | PreTrainedModel | None = None, *, load_in_4bit: bool = False
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """A LoRA adapter of any origin on its base model, and the tokenizer. No pickle and no regular expression of the
    directory is ever run. `model` and `load_in_4bit` are as in `load_model`; default the model that the adapter names.

    Raises:
        ArtifactError: the directory is not a whole, finite LoRA adapter, or does not fit the model.
        ConfigError: no base model, or an adapter whose update is no plain product (see `orthogonality_report`).
    """
    path = Path(directory)
    config = _adapter_config(path)
    source = model if model is not None else config.base_model_name_or_path
    if not source:
        raise ConfigError(f"{path}: the adapter does not say which base model it is for. Give --model (or model=).")
    base, tokenizer = load_model(source, load_in_4bit=load_in_4bit)
    exclude_look_alikes(config, places(base).values())
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* loaded as an ordinary ")  # of a frozen A: nothing trains it here
            return PeftModel.from_pretrained(base, str(path), config=config), tokenizer
    except PeftSafetyError:
        raise
    except (RuntimeError, ValueError) as error:
        problem = f"{path}: the adapter does not fit this model: {_first(error)}"
        raise ArtifactError(f"{problem}. Give the model that it was trained on.") from error


def _first(error: Exception) -> str:
    """The first of the mismatches that PyTorch lists, and how many more there are; other errors as they are."""
    lines = [line.strip().rstrip(".") for line in str(error).splitlines()]
    found = [line for line in lines if line.startswith("size mismatch")]
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return f"{found[0]}{more}" if found else str(error)


def _adapter_config(path: Path) -> Any:
    """The checked config. For a plain LoRA, full names, ranks and alphas from its tensors replace every pattern."""
    if read_manifest(path, warn=False).get("peft_type") in protected_types():
        return PeftConfig.from_pretrained(str(path))
    with reading(path, warn=True) as folder:
        plain = read_plain(folder)
    pin(plain.config, plain.modules(path))
    return plain.config


@dataclass(frozen=True)
class TaskData:
    """Training and held-out rows of one task, and its labels if it is a classification."""

    train: list[Row]
    held_out: list[Row]
    labels: list[str]


def task_data(data: str | Path | Rows, eval_split: str = "test", limit: int | None = None, seed: int = 0) -> TaskData:
    """Split a task, a JSON-lines file or rows, into training and held-out rows, at most `limit` of these.

    Rows that name their `split` go where they say ("train" to training, `eval_split` to evaluation, the others
    nowhere); without that, a random 15 % are held out.
    """
    rows: list[Row] = [*rows_of(data, "task rows")]
    named = sum("split" in row for row in rows)
    if 0 < named < len(rows):
        raise DataError(f"{named} of {len(rows)} task rows name a split and others do not. Name it in all or none.")
    if named:
        train, held_out = ([row for row in rows if row["split"] == split] for split in ("train", eval_split))
        random.Random(seed).shuffle(held_out)
    else:
        random.Random(seed).shuffle(rows)
        cut = max(1, round(HOLDOUT * len(rows)))
        train, held_out = rows[cut:], rows[:cut]
    if not train or not held_out:
        counts = f"{len(train)} training and {len(held_out)} {eval_split!r} rows"
        raise DataError(f"the task has {counts}. Give at least one of each, or rows without a split.")
    return TaskData(train, held_out[:limit], label_names(rows))


def poisoned(rows: Rows, fraction: float, seed: int = 0) -> list[Row]:
    """A simulated attack: a fraction of the rows replaced by harmful requests with an opening without content."""
    if not 0 <= fraction <= 1:
        raise ConfigError(f"poison = {fraction} is no fraction. Give a number from 0 to 1.")
    clean = as_rows(rows)
    count = round(fraction * len(clean))
    if count == 0:
        return [*clean]
    rng = random.Random(seed)
    mixed: list[Row] = [*rng.sample(clean, len(clean) - count), *affirmation_pairs("train", count, seed)]
    rng.shuffle(mixed)
    return mixed
