"""Ways to damage an adapter directory, for the table in `cases.py`."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path

import torch

from tests.hostile import tools
from tests.hostile.tools import (
    ADAPTER,
    PREFIX,
    B,
    Damage,
    Tensors,
    tensors,
)


def write(name: str, content: bytes) -> Damage:
    return lambda directory: void((directory / name).write_bytes(content))


def void(_: object) -> None:
    return None


def truncate(name: str, keep: float) -> Damage:
    def damage(directory: Path) -> None:
        content = (directory / name).read_bytes()
        (directory / name).write_bytes(content[: int(len(content) * keep)])

    return damage


def remove(name: str) -> Damage:
    return lambda directory: (directory / name).unlink()


def header(json_text: str, length: int | None = None) -> Damage:
    """A safetensors file that is only a header, its hash forged."""

    def damage(directory: Path) -> None:
        raw = json_text.encode()
        (directory / ADAPTER).write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw)
        tools.forge(directory)

    return damage


def link(name: str) -> Damage:
    """The file moves out of the directory, a link stays."""

    def damage(directory: Path) -> None:
        outside = directory.with_name("outside")
        outside.mkdir()
        (directory / name).rename(outside / name)
        (directory / name).symlink_to(outside / name)

    return damage


def all_of(*damages: Damage) -> Damage:
    return lambda directory: [damage(directory) for damage in damages] and None


def drop(*keys: str):
    return lambda content: [content.pop(key) for key in keys]


def leak(content: Tensors) -> None:
    content[B] += 0.1 * torch.randn(content[B].shape, generator=torch.Generator().manual_seed(0))


def renamed(old: str, new: str):
    def change(content: Tensors) -> None:
        content[new] = content.pop(old)

    return change


def smuggled(name: str):
    """A tensor that `load_state_dict` would put over a base weight."""
    key = f"{PREFIX}{name}"
    return tensors(
        lambda content: content.update({key: torch.ones(32, 64) if "down" in name else torch.full((32,), 7.0)}),
        listed=(key,),
    )


class Bomb:
    """Unpickling this creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def pickled(instead: bool, name: str = "adapter_model.bin") -> Damage:
    def damage(directory: Path) -> None:
        (directory / name).write_bytes(pickle.dumps(Bomb(directory / "ran")))
        if instead:
            (directory / ADAPTER).unlink()

    return damage


def other(content: Tensors, seed: int) -> Tensors:
    """Another set of bases for the same modules, everything else kept."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.linalg.qr(torch.randn(u.shape, generator=generator)).Q
        for key, u in content.items()
        if key.startswith("basis.")
    }
