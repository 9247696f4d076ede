"""What is written beside a plain LoRA whose `lora_A` was made blind to a null space and then frozen. With the
subspace, the blindness can be checked; without it, only that these are the factors that were made blind.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peft_safety.core import files
from peft_safety.core.projection import leak
from peft_safety.errors import ArtifactError

FILE_NAME = "safety_certificate.json"
FORMAT = "peft_safety.certificate.v1"
CASTS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Dtypes to which a model may be cast. A cast factor is the same factor, rounded."""


@dataclass(frozen=True)
class FrozenFactor:
    """One module's `lora_A`: its `digest` by dtype, the null space's `k`, and `||A Q|| / ||A||` in fp32."""

    sha256: dict[str, str]
    k: int
    leak: float

    @classmethod
    def of(cls, a: Tensor, k: int, worst: float) -> FrozenFactor:
        return cls({name: digest(a.to(dtype)) for name, dtype in CASTS.items()}, k, worst)

    def precision(self, a: Tensor) -> torch.dtype | None:
        """The dtype whose rounding `a` has, if it is this factor; None for any other."""
        for name, dtype in CASTS.items():
            rounded = a.detach().to(dtype)
            if torch.equal(rounded.to(a.dtype), a) and digest(rounded) == self.sha256[name]:
                return dtype
        return None


@dataclass(frozen=True)
class Certificate:
    """The content of the file. `method` is its `PEFT_KEY`, `subspace` the digest of the null space."""

    method: str
    subspace: str
    settings: dict[str, Any]
    modules: dict[str, FrozenFactor]
    directory: Path | None = None

    def write(self, directory: Path) -> None:
        """Write it into an adapter directory. An ArtifactError says that it is too large to be read again."""
        content = {"format": FORMAT, **asdict(self)}
        del content["directory"]
        text = json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n"
        if len(text) > files.MAX_LISTING_BYTES:
            raise ArtifactError(f"{directory / FILE_NAME}: {len(self.modules)} modules are too many to certify.")
        (directory / FILE_NAME).write_text(text, encoding="utf-8")


def certified_factor(a: Tensor, basis: Tensor) -> FrozenFactor:
    return FrozenFactor.of(a, int(basis.shape[-1]), leak(basis.to(a.device), a, "in"))


def read_certificate(directory: Path) -> Certificate | None:
    """The certificate of an adapter directory; None without one. A malformed one is an ArtifactError."""
    path = directory / FILE_NAME
    if not os.path.lexists(path):
        return None
    content = files.read_json(path, files.MAX_LISTING_BYTES)
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
    return Certificate(content["method"], content["subspace"], content["settings"], factors, directory.resolve())


def digest(a: Tensor) -> str:
    """sha256 of a factor without its zero rows, with which PEFT pads for compiled hot-swapping (each group of a
    convolution). They see nothing.
    """
    a = a.detach().cpu().contiguous()
    rows = a[a.ne(0).any(dim=1)].contiguous()
    head = f"{str(a.dtype).removeprefix('torch.')}|{a.shape[1]}|{rows.shape[0]}|".encode()
    return hashlib.sha256(head + rows.view(torch.uint8).numpy().tobytes()).hexdigest()


def _is_factor(entry: Any) -> bool:
    if not isinstance(entry, dict) or set(entry) != {"sha256", "k", "leak"}:
        return False
    hashes, k, worst = entry["sha256"], entry["k"], entry["leak"]
    known = isinstance(hashes, dict) and set(hashes) == set(CASTS) and all(isinstance(h, str) for h in hashes.values())
    return known and type(k) is int and k >= 0 and type(worst) in (int, float) and 0 <= worst <= 1
