"""Learned masks: a logit `l` keeps an entry, for all tasks, with probability `sigmoid(l)`. Training sees a concrete
(Gumbel-sigmoid) sample of that, in (0, 1), through which gradients flow; export fixes it.

Reference: Yi et al., SOMF, arXiv 2405.09055; concrete distribution: Maddison et al., arXiv 1611.00712.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from peft_safety.core import files
from peft_safety.core.projection import all_finite
from peft_safety.errors import ArtifactError, ConfigError

Shape = tuple[int, ...]
Granularity = Literal["element", "row", "rank", "module"]
Rescale = Literal["mean", "none"]
Export = Literal["threshold", "topk", "sample"]
FILE_NAME = "safety_masks.safetensors"
HEADER = "peft_safety.masks"
VERSION = 2


def stream(*parts: object) -> int:
    """A seed that depends on all parts, and on nothing else."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:7], "big")


def mask_shape(weight: Tensor, granularity: Granularity) -> Shape:
    """Shape of the mask of one weight: that of the weight, or one entry per row, or a single entry."""
    if granularity == "element":
        return tuple(weight.shape)
    return (len(weight) if granularity == "row" else 1, *[1] * (weight.ndim - 1))


def concrete(logit: Tensor, u: Tensor, temperature: float) -> Tensor:
    """`m = sigmoid((l + log u - log(1 - u)) / tau)` for uniform noise `u` in (0, 1)."""
    return torch.sigmoid((logit + torch.logit(u)) / temperature)


def noise(like: Tensor, seed: int) -> Tensor:
    """Uniform noise strictly inside (0, 1), the same for the same seed on one kind of device."""
    generator = torch.Generator(device=like.device).manual_seed(seed)
    tiny = torch.finfo(like.dtype).eps / 2
    return torch.rand(like.shape, generator=generator, device=like.device, dtype=like.dtype).clamp_(tiny, 1 - tiny)


def rescaled(vector: Tensor, mask: Tensor, how: Rescale) -> Tensor:
    """`V m`; "mean" divides by the mean of m, as published, which lengthens a real task vector 1.4 to 1.8 times."""
    masked = vector * mask
    return masked / mask.mean().clamp(min=torch.finfo(masked.dtype).tiny) if how == "mean" else masked


@dataclass(frozen=True)
class Masks:
    """Fixed masks by name: uint8, 0 (dropped) or 1 (kept); and where they come from, as plain JSON values."""

    values: dict[str, Tensor]
    record: dict[str, Any] = field(default_factory=dict)

    def of(self, name: str) -> Tensor:
        return self.values[name].float()

    def density(self) -> float:
        return float(torch.cat([value.flatten() for value in self.values.values()]).float().mean())

    def check(self, shapes: Mapping[str, Shape]) -> None:
        """Refuse masks of other modules or of another granularity than a fusion needs."""
        own = {name: tuple(value.shape) for name, value in self.values.items()}
        for name in sorted(own.keys() | shapes.keys()):
            if own.get(name) != shapes.get(name):
                both = f"the masks have {own.get(name, '(none)')}, this fusion needs {shapes.get(name, '(none)')}"
                raise ConfigError(f"{name}: {both}. Use the inputs and the granularity of their training.")

    def shuffled(self, seed: int = 0) -> Masks:
        """The control: the same number of kept entries at random places, in every group of `_by_group`."""

        def moved(entries: Tensor, names: list[str]) -> Tensor:
            generator = torch.Generator().manual_seed(stream(seed, "control", *names))
            return entries[torch.randperm(len(entries), generator=generator)]

        return Masks(_by_group(self.values, moved), {**self.record, "control": seed})


@torch.no_grad()
def export(
    logits: Mapping[str, Tensor],
    how: Export,
    *,
    density: float | None = None,
    seed: int = 0,
    record: Mapping[str, Any] | None = None,
) -> Masks:
    """Fixed masks from trained logits. The same logits give the same bits, "sample" included.

    Args:
        how: "threshold" keeps `l > 0` (more likely kept than not); "topk" the `round(density n)` largest in every
            group of `_by_group`, the earlier of equals first; "sample" draws every entry with its probability from a
            seed.
    """
    plain = {name: logit.detach().cpu().float() for name, logit in logits.items()}
    facts = {**(record or {}), "export": how}
    if how == "topk":
        if density is None:
            raise ConfigError("export='topk' needs a density. Give export_density in (0, 1).")

        def kept(entries: Tensor, _: list[str]) -> Tensor:
            order = torch.sort(entries, descending=True, stable=True).indices
            return torch.zeros_like(entries, dtype=torch.uint8).index_fill_(0, order[: round(density * len(order))], 1)

        return Masks(_by_group(plain, kept), {**facts, "export_density": density})
    if how == "sample":
        plain = {name: x + torch.logit(noise(x, stream(seed, "sample", name))) for name, x in plain.items()}
        facts["seed"] = seed
    return Masks({name: (x > 0).to(torch.uint8) for name, x in plain.items()}, facts)


def _by_group(tensors: Mapping[str, Tensor], change: Callable[[Tensor, list[str]], Tensor]) -> dict[str, Tensor]:
    """New entries from all entries that compete, and their names: each mask by itself, those of one entry together."""
    single = [name for name, tensor in tensors.items() if tensor.numel() == 1]
    result: dict[str, Tensor] = {}
    for names in [[name] for name in tensors if name not in single] + ([single] if single else []):
        entries = change(torch.cat([tensors[name].flatten() for name in names]), names)
        parts = entries.split([tensors[name].numel() for name in names])
        result |= {name: part.view(tensors[name].shape) for name, part in zip(names, parts, strict=True)}
    return {name: result[name] for name in tensors}


def save_masks(masks: Masks | Mapping[str, Tensor], path: Path, record: Mapping[str, Any] | None = None) -> Path:
    """Write masks, one byte per entry, or logits to a file or into a directory. Equal ones give equal files."""
    values, record = (masks.values, masks.record) if isinstance(masks, Masks) else (masks, record or {})
    path = path if path.suffix == ".safetensors" else path / FILE_NAME
    header = json.dumps({"version": VERSION, "record": dict(record)}, sort_keys=True)
    # one metadata entry only: safetensors writes several in a random order
    save_file({name: value.detach().cpu().contiguous() for name, value in values.items()}, path, {HEADER: header})
    return path


def load_masks(path: Path) -> Masks | dict[str, Tensor]:
    """Masks, or logits by name, from a file or a directory that has one."""
    path = path / FILE_NAME if path.is_dir() else path
    with files.open_tensors(path) as handle:
        header = files.parse_json((handle.metadata() or {}).get(HEADER, "{}"), str(path))
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    record, dtypes = header.get("record"), {tensor.dtype for tensor in tensors.values()}
    if header.get("version") != VERSION or not isinstance(record, dict):
        raise ArtifactError(f"{path} holds no masks of this package. Give a {FILE_NAME} that fuse wrote.")
    if dtypes == {torch.uint8} and all(bool((tensor <= 1).all()) for tensor in tensors.values()):
        return Masks(tensors, record)
    if dtypes == {torch.float32} and all(map(all_finite, tensors.values())):
        return tensors
    raise ArtifactError(f"{path} holds neither masks of 0 and 1 nor finite logits. Copy the file or train again.")
