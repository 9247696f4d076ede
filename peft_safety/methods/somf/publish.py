"""What a fusion leaves on disk: a plain LoRA, or sharded safetensors, with masks and a provenance card, published as a
whole or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from peft_safety import files, publish
from peft_safety.estimate.checkpoints import INDEX
from peft_safety.methods.somf.masks import Masks
from peft_safety.methods.somf.storage import save_masks, save_tensors
from peft_safety.names import pin
from peft_safety.plain_lora import ADAPTER_FILE, CARD, MANIFEST, PREFIX

RECORD = "peft_safety.fusion"
"""Key of the record in the header of the adapter's safetensors file, and in the metadata of a checkpoint's index."""
BESIDE = ("*.json", "*.txt", "*.model", "*.jinja")
"""Files of the safe checkpoint that go with its weights: config and tokenizer."""

Factors = Mapping[str, tuple[Tensor, Tensor]]


def main_process() -> bool:
    """Whether this process is the one that writes: of several that train together, the first."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank() == 0
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def target(directory: Path, manifest: str) -> Iterator[Path]:
    """`publish.publishing` that leaves no empty directory behind where it fails."""
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        with publish.publishing(directory, manifest) as staging:
            yield staging
    except BaseException:
        for path in made:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        raise


def write_adapter(
    directory: Path,
    factors: Factors,
    base: str | None,
    fields: Mapping[str, Any],
    masks: Masks | None,
    record: Mapping[str, Any],
    card: str,
) -> None:
    """A plain LoRA directory that any PEFT loads. The scaling is folded into B, so that `lora_alpha = r` in every
    module.

    Args:
        base: `base_model_name_or_path`.
        fields: config of an input, for its task type and `fan_in_fan_out`.
    """
    config = lora_config(factors, base, fields)
    tensors = {
        f"{PREFIX}{name}.lora_{kind}.weight": factor
        for name, pair in factors.items()
        for kind, factor in zip("AB", pair, strict=True)
    }
    with target(directory, MANIFEST) as staging:
        save_tensors(
            {key: tensor.contiguous() for key, tensor in tensors.items()},
            staging / ADAPTER_FILE,
            {RECORD: json.dumps(dict(record), sort_keys=True)},
        )
        if masks is not None:
            save_masks(masks, staging)
        (staging / CARD).write_text(card, encoding="utf-8")
        config.save_pretrained(str(staging))
        stored = files.read_json(staging / MANIFEST)
        stored["target_modules"] = sorted(factors)  # PEFT keeps a set, whose order differs from run to run
        (staging / MANIFEST).write_text(json.dumps(stored, indent=2, sort_keys=True), encoding="utf-8")


def lora_config(
    factors: Factors, base: str | None, fields: Mapping[str, Any], there: Mapping[str, str] | None = None
) -> LoraConfig:
    """The config of these factors, modules by full name; `there` are the `places` of a model that it is for."""
    ranks = {name: a.shape[0] for name, (a, _) in factors.items()}
    r = max(ranks.values())
    config = LoraConfig(
        r=r,
        lora_alpha=r,
        target_modules=sorted(factors),
        task_type=fields.get("task_type"),
        fan_in_fan_out=bool(fields.get("fan_in_fan_out", False)),
        base_model_name_or_path=base,
        inference_mode=True,
    )
    pin(config, {name: (rank, rank) for name, rank in ranks.items()}, there)
    return config


class Shards:
    """Writes tensors into shards of bounded size as they come; the index, last, makes a checkpoint of them."""

    def __init__(self, staging: Path, sizes: Mapping[str, int], limit: int) -> None:
        self.staging, self.place = staging, _placed(sizes, limit)
        self.total, self.held = sum(sizes.values()), {}  # type: ignore[var-annotated]

    def add(self, key: str, tensor: Tensor) -> None:
        """In the order of the sizes. A full shard is written and forgotten."""
        self.held[key] = tensor.contiguous()
        name = self.place[key]
        if len(self.held) == sum(found == name for found in self.place.values()):
            save_file(self.held, self.staging / name, metadata={"format": "pt"})
            self.held = {}

    def finish(self, record: Mapping[str, Any]) -> None:
        """Write the index."""
        index = {"metadata": {"total_size": self.total, RECORD: dict(record)}, "weight_map": self.place}
        (self.staging / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True), encoding="utf-8")


def _placed(sizes: Mapping[str, int], limit: int) -> dict[str, str]:
    """Tensor -> file, filled in order; a tensor above the limit has a shard of its own."""
    groups: list[list[str]] = [[]]
    room = limit
    for key, size in sizes.items():
        if size > room and groups[-1]:
            groups.append([])
            room = limit
        groups[-1].append(key)
        room -= size
    names = [f"model-{i:05}-of-{len(groups):05}.safetensors" for i in range(1, len(groups) + 1)]
    return {key: name for name, group in zip(names, groups, strict=True) for key in group}


def copy_beside(source: Path, staging: Path) -> None:
    """Config and tokenizer of the safe checkpoint."""
    for pattern in BESIDE:
        for path in sorted(source.glob(pattern)):
            if path.name not in (INDEX, MANIFEST) and path.is_file():
                shutil.copy(files.child(source, path.name), staging / path.name)


def card_of(record: Mapping[str, Any], modules: list[dict[str, Any]], kind: str) -> str:
    """The provenance card."""
    facts = {
        key: value
        for key, value in record.items()
        if isinstance(value, (str, int, float, list)) and key not in ("version", "tasks")
    }
    rows = "\n".join(f"| {key.replace('_', ' ')} | {value} |" for key, value in facts.items())
    inputs = [("safe", record["safe"]), *(("task", task) for task in record["tasks"])]
    table = "\n".join(f"| {role} | `{found['name']}` | `{found['fingerprint'][:16]}` |" for role, found in inputs)
    kept = "\n".join(
        f"| {row['name']} | {row['rank'] or '-'} | {_shown(row['density'])} | {_shown(row['kept'])} | "
        f"{_shown(row['error'])} |"
        for row in modules
    )
    tags = "library_name: peft\ntags: [lora, safety, peft-safety]" if kind == "LoRA" else "tags: [safety, peft-safety]"
    return f"""---
{tags}
---
# Fused by peft-safety

A {kind} made of one safe model and {len(record["tasks"])} fine-tuned one{"" if len(record["tasks"]) == 1 else "s"}
(SOMF, arXiv 2405.09055). What it does to a model's behavior is not promised by anything here:
measure refusal, over-refusal and the tasks.

| input | name | fingerprint |
|---|---|---|
{table}

| setting | |
|---|---|
{rows}

Density: share of the mask that is kept. Kept: length of the tasks' part of the update, relative to the same fusion
without a mask. Error: of the recompression, relative to the whole update.

| module | rank | density | kept | error |
|---|---:|---:|---:|---:|
{kept}
"""


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def element_size(dtype: str) -> int:
    """Bytes of one entry of a safetensors dtype of floating point or not."""
    return int("".join(c for c in dtype if c.isdigit()) or 8) // 8
