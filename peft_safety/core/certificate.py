"""What is written beside a plain LoRA whose `lora_A` was made blind to a null space and then frozen.

`adapter_config.json` and `adapter_model.safetensors` are plain LoRA, for every loader. `safety_certificate.json` says
which null space (its digest), and holds the sha256 of each `lora_A`. Whoever has the subspace can check the blindness
itself; without it, only that these are the factors that were made blind.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peft_safety.core import files
from peft_safety.errors import ArtifactError

FILE_NAME = "safety_certificate.json"
FORMAT = "peft_safety.certificate.v1"
CASTS = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes to which a whole model may be cast. A cast factor is the same factor, rounded."""


@dataclass(frozen=True)
class FrozenFactor:
    """One module's `lora_A`.

    Attributes:
        sha256: of its dtype, columns and rows, see `digest`.
        k: directions of the null space.
        leak: `||A Q|| / ||A||` when it was made, in fp32.
    """

    sha256: str
    k: int
    leak: float


@dataclass(frozen=True)
class Certificate:
    """The content of the file.

    Attributes:
        method: the method's name, as `PEFT_KEY`.
        subspace: digest of the null space's bases.
        settings: the method's own options, to read.
        modules: the frozen factors by module.
        directory: where it was read from; None for one that was not.
    """

    method: str
    subspace: str
    settings: dict[str, Any]
    modules: dict[str, FrozenFactor]
    directory: Path | None = None

    def write(self, directory: Path) -> None:
        """Write it into an adapter directory."""
        content = {"format": FORMAT, **asdict(self)}
        del content["directory"]
        text = json.dumps(content, indent=1, sort_keys=True, allow_nan=False)
        (directory / FILE_NAME).write_text(text + "\n", encoding="utf-8")


def read_certificate(directory: Path) -> Certificate | None:
    """The certificate of an adapter directory; None without one.

    Raises:
        ArtifactError: it is malformed.
    """
    path = directory / FILE_NAME
    if not path.is_file():
        return None
    content = files.read_json(path)
    modules = content.get("modules")
    if (
        content.get("format") != FORMAT
        or not all(isinstance(content.get(key), str) for key in ("method", "subspace"))
        or not isinstance(content.get("settings"), dict)
        or not isinstance(modules, dict)
        or not modules
        or not all(map(_is_factor, modules.values()))
    ):
        raise ArtifactError(f"{path} is not a certificate of this package ({FORMAT}). Copy or save the adapter again.")
    factors = {name: FrozenFactor(**entry) for name, entry in modules.items()}
    return Certificate(content["method"], content["subspace"], content["settings"], factors, directory)


def digest(a: Tensor) -> str:
    """sha256 of a factor: dtype, columns, and the bytes of its rows up to the last that is not zero. PEFT pads with
    zero rows for compiled hot-swapping.
    """
    a = a.detach().cpu().contiguous()
    used = a.ne(0).any(dim=1).nonzero()
    rows = a[: int(used[-1]) + 1 if len(used) else 0].contiguous()
    head = f"{str(a.dtype).removeprefix('torch.')}|{a.shape[1]}|{rows.shape[0]}|".encode()
    return hashlib.sha256(head + rows.view(torch.uint8).numpy().tobytes()).hexdigest()


def digests(a: Tensor) -> frozenset[str]:
    """The digests of a factor, as it is and cast."""
    return frozenset(digest(a.to(dtype)) for dtype in {a.dtype, *CASTS})


def _is_factor(entry: Any) -> bool:
    return (
        isinstance(entry, Mapping)
        and set(entry) == {"sha256", "k", "leak"}
        and isinstance(entry["sha256"], str)
        and type(entry["k"]) is int
        and type(entry["leak"]) in (int, float)
    )
