"""Masks and logits as one safetensors file: hard masks as packed bits, keep probabilities in 8 bits, logits in fp32;
provenance in the header.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from peft_safety import files
from peft_safety.errors import ArtifactError
from peft_safety.estimate.checkpoints import MAX_INDEX_BYTES
from peft_safety.methods.somf.masks import SOFT_LEVELS, Masks

FILE_NAME = "safety_masks.safetensors"
HEADER = "peft_safety.masks"
LOGITS = "logits"
KINDS = {"bits": 1, "bytes": SOFT_LEVELS}
"""How masks are stored, and how many levels an entry then has."""
VERSION = 1


def save_masks(masks: Masks, path: Path) -> Path:
    """Write masks. Equal masks give equal files.

    Args:
        path: a file, or a directory for `safety_masks.safetensors`.
    """
    kind = next(name for name, levels in KINDS.items() if levels == masks.levels)
    stored = {
        name: _packed(value) if kind == "bits" else value.flatten().clone() for name, value in masks.values.items()
    }
    return _write(stored, {name: tuple(value.shape) for name, value in masks.values.items()}, kind, masks.record, path)


def save_logits(logits: Mapping[str, Tensor], path: Path, record: Mapping[str, Any]) -> Path:
    """Write trained logits, from which masks of any density can still be exported."""
    stored = {name: value.detach().cpu().float().flatten().clone() for name, value in logits.items()}
    return _write(stored, {name: tuple(value.shape) for name, value in logits.items()}, LOGITS, record, path)


def load_masks(path: Path) -> Masks | dict[str, Tensor]:
    """Masks, or logits by name, from a file or a directory that has one.

    Raises:
        ArtifactError: no such file, not one of masks, or one whose header does not fit its tensors.
    """
    path = path / FILE_NAME if path.is_dir() else path
    with files.open_tensors(path) as handle:
        header = files.parse_json((handle.metadata() or {}).get(HEADER, "{}"), str(path), MAX_INDEX_BYTES)
        kind, shapes, record = header.get("kind"), header.get("shapes"), header.get("record")
        if (
            header.get("version") != VERSION
            or kind not in (*KINDS, LOGITS)
            or not isinstance(shapes, dict)
            or not isinstance(record, dict)
        ):
            raise ArtifactError(f"{path} holds no masks of this package. Give a {FILE_NAME} that fuse wrote.")
        if set(shapes) != set(handle.keys()):
            raise ArtifactError(
                f"{path}: its header and its tensors name other masks, as "
                f"{sorted(set(shapes) ^ set(handle.keys()))[0]!r}. Copy it again."
            )
        for name, shape in shapes.items():  # before anything is allocated
            _check(path, name, shape, kind, handle.get_slice(name))
        raw = {name: handle.get_tensor(name) for name in shapes}
    for name, tensor in raw.items():
        if kind == LOGITS and not bool(torch.isfinite(tensor).all()):
            raise ArtifactError(
                f"{path}: the logits of {name} {shapes[name]} are not finite. Train again, or load an earlier "
                "checkpoint."
            )
        raw[name] = (_unpacked(tensor, math.prod(shapes[name])) if kind == "bits" else tensor).view(shapes[name])
    return raw if kind == LOGITS else Masks(raw, KINDS[kind], record)


def _write(
    stored: dict[str, Tensor], shapes: dict[str, tuple[int, ...]], kind: str, record: Mapping[str, Any], path: Path
) -> Path:
    header = {"version": VERSION, "kind": kind, "shapes": shapes, "record": dict(record)}
    path = path if path.suffix == ".safetensors" else path / FILE_NAME
    save_tensors(stored, path, {HEADER: json.dumps(header, sort_keys=True)})
    return path


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """`save_file` whose bytes depend on nothing but its arguments: safetensors writes metadata in the order of a hash
    table, which differs from run to run.
    """
    save_file(tensors, path, metadata={"format": "pt", **metadata})
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > length:
            raise ArtifactError(
                f"{path}: its header cannot be put in order ({len(text)} bytes instead of {length}). Use plain tensor "
                "names."
            )
        file.seek(8)
        file.write(text.ljust(length))


def _check(path: Path, name: str, shape: Any, kind: str, tensor: Any) -> None:
    whole = (
        isinstance(shape, list)
        and 1 <= len(shape) <= 8
        and all(isinstance(d, int) and not isinstance(d, bool) and d > 0 for d in shape)
    )
    entries = math.prod(shape) if whole else 0
    length = -(-entries // 8) if kind == "bits" else entries
    dtype = "F32" if kind == LOGITS else "U8"
    if not whole or list(tensor.get_shape()) != [length] or tensor.get_dtype() != dtype:
        raise ArtifactError(
            f"{path}: {name} is {tensor.get_shape()} of {tensor.get_dtype()}, not {kind} of a mask {shape}. Copy the "
            "file again."
        )


def _packed(bits: Tensor) -> Tensor:
    """Eight entries a byte, the first in the highest bit."""
    return torch.from_numpy(np.packbits(bits.flatten().numpy()))


def _unpacked(packed: Tensor, count: int) -> Tensor:
    return torch.from_numpy(np.unpackbits(packed.numpy(), count=count))
