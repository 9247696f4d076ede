"""The base model that a saved adapter is merged into: in the precision that it was trained on."""

from __future__ import annotations

import os
from pathlib import Path

from peft import PeftModel
from transformers import AutoConfig, PreTrainedTokenizerBase

from peft_safety.core import files
from peft_safety.core.adapter_dir import check_adapter, protected_types
from peft_safety.core.certificate import read_certificate
from peft_safety.core.missing import not_found
from peft_safety.core.plain_lora import check_no_adapter, check_no_model, read_manifest
from peft_safety.core.snapshot import reading
from peft_safety.errors import ConfigError
from peft_safety.recipes.load import load_adapter

UNKNOWN = "the adapter does not say what it was trained on: if that was a 4-bit base, give --load-in-4bit"


def trained_on(directory: str | Path) -> str | None:
    """The precision of the base: "dense" (16 or 32 bits), "4bit", "8bit" or another quantization. It stands in the
    certificate, or is that of the base on which the subspace was calibrated; None where neither says it.
    """
    with reading(directory) as path:
        if (certificate := read_certificate(path)) is not None:
            found = certificate.settings.get("precision")
        elif read_manifest(path, warn=False).get("peft_type") in protected_types():
            found = check_adapter(path).subspace.provenance.get("precision")
        else:
            return None
    return found if isinstance(found, str) else None


def load_for_merge(
    directory: str | Path, out: Path, model: str | None, to: str, load_in_4bit: bool | None = None
) -> tuple[PeftModel, PreTrainedTokenizerBase, str]:
    """An adapter on its base, the tokenizer, and one line on how the base was loaded, and why.

    A quantized checkpoint is taken as it is. Else `load_in_4bit` decides; without it, merges to 4 bits load in 4 bits,
    and "16bit" in what the adapter was trained on, which is not quantized if it is unknown.

    Raises:
        ConfigError: no base, or an adapter of an otherwise quantized base, and a checkpoint that is not quantized; or
            the result cannot be saved in `out`, see `check_target`.
        ArtifactError: `out` cannot be written.
    """
    precision = trained_on(directory)
    source = model or read_manifest(Path(directory), warn=False).get("base_model_name_or_path")
    if not source:
        raise ConfigError(f"{directory}: the adapter does not say which base model it is for. Give --model.")
    check_target(out, source, to)
    if _is_quantized(source):
        four, why = False, "its checkpoint is quantized"
    elif load_in_4bit is not None:
        four, why = load_in_4bit, "as asked for"
    elif to != "16bit":
        trained = "; the adapter was trained on an unquantized one" if precision == "dense" else ""
        four, why = True, f"for {to}{trained}"
    elif precision in (None, "dense", "4bit"):
        four = precision == "4bit"
        why = UNKNOWN if precision is None else "as the adapter was trained"
    else:
        raise ConfigError(
            f"{directory}: the adapter was trained on a base of kind {precision!r}, and {source} is not quantized. "
            "Give a checkpoint of that kind (--model), or --no-load-in-4bit to merge into the unquantized one."
        )
    loaded, tokenizer = load_adapter(directory, model, load_in_4bit=four)
    base = loaded.get_base_model()
    how = "quantized" if getattr(base.config, "quantization_config", None) else "unquantized"
    how = "in 4 bits" if four else f"{how}, in {str(base.dtype).removeprefix('torch.')}"
    return loaded, tokenizer, f"base loaded {how}: {why}"


def check_target(out: Path, base: str, to: str) -> None:
    """Before anything is loaded: a ConfigError refuses a directory with an adapter, which would be loaded on top of
    the merged model; that of the base; and for "nf4+residual", which is an adapter, that of any model.
    """
    check_no_adapter(out)
    if os.path.isdir(base) and os.path.realpath(base) == os.path.realpath(out):
        raise ConfigError(f"{out} is the base model itself, which this would replace. Give another directory.")
    if to == "nf4+residual":
        check_no_model(out)
    files.check_place(out / "merge.json")


def _is_quantized(source: str) -> bool:
    try:
        return getattr(AutoConfig.from_pretrained(source), "quantization_config", None) is not None
    except (OSError, ValueError) as error:
        remedy = "Give a directory or a Hub id (--model)."
        raise ConfigError(not_found("model", source, error, remedy)) from error
