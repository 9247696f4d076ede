"""A saved adapter merged into the 4-bit form of its base model, from directory to directory."""

from __future__ import annotations

import json
from pathlib import Path

from peft_safety.convert.merge import MergeResult, MergeTo, merge_quantized
from peft_safety.recipes.load import load_adapter

REPORT = "merge.json"


def merge_directory(
    adapter: str | Path, out: str | Path, to: MergeTo, model: str | None = None, *, force: bool = False
) -> MergeResult:
    """Load the base model in NF4, merge a LoRA adapter that was trained on it, and save the whole model, or a plain
    LoRA for the 4-bit base ("nf4+residual"), with its tokenizer and the figures (`merge.json`).
    """
    loaded, tokenizer = load_adapter(adapter, model, load_in_4bit=True)
    result = merge_quantized(loaded, to, force=force, verbose=False)
    result.model.save_pretrained(str(out))  # type: ignore[operator]
    tokenizer.save_pretrained(str(out))
    Path(out, REPORT).write_text(json.dumps(result.to_json(), indent=1) + "\n", encoding="utf-8")
    return result
