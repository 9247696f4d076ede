"""One base with two states of an adapter on it, and a save that is stopped at any of its steps."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn

from peft_safety import verify
from peft_safety.errors import ArtifactError
from tests.crash.steps import at_step, die, steps_of
from tests.hostile import tools
from tests.tiny import tiny_llama

FILES = ["README.md", tools.MANIFEST, tools.ADAPTER, tools.SUBSPACE]


@dataclass
class World:
    """One base with two states of an adapter on it."""

    base: nn.Module
    models: dict[str, nn.Module]
    folders: dict[str, Path]
    logits: dict[str, Tensor]
    digests: dict[str, str] = field(default_factory=dict)

    def state(self, directory: Path, subfolder: str = "") -> str:
        """Which of the two adapters a reader gets, or `interrupted`: it is checked every time, and its logits are
        compared once for each distinct content. Reading changes nothing."""
        before = listing(directory)
        try:
            verify(directory / subfolder)
        except ArtifactError as error:
            if f"peft-safety recover {directory}" not in str(error):
                raise
            assert listing(directory) == before, "a reader wrote"
            return "interrupted"
        assert listing(directory) == before, "a reader wrote"
        digest = contents(directory / subfolder)
        if digest not in self.digests:
            loaded = PeftModel.from_pretrained(tiny_llama(), str(directory), subfolder=subfolder or None)
            matches = [
                name for name, expected in self.logits.items() if torch.equal(loaded(tools.tokens()).logits, expected)
            ]
            assert len(matches) == 1, "neither the old nor the new function"
            self.digests[digest] = matches[0]
        return self.digests[digest]


def listing(directory: Path) -> list[tuple]:
    return sorted((str(path), path.lstat().st_ino, path.lstat().st_mtime_ns) for path in directory.rglob("*"))


def contents(directory: Path) -> str:
    return hashlib.sha256(b"".join((directory / name).read_bytes() for name in FILES[1:])).hexdigest()


def save(world: World, directory: Path, at: int, act: Callable[[str], None] = die, model: str = "new") -> int:
    """Save in a child that does `act` at its `at`-th step."""
    return at_step(directory, at, lambda: world.models[model].save_pretrained(str(directory)), act)


def steps(world: World, directory: Path, model: str = "new") -> list[str]:
    """What a whole save does, step by step."""
    return steps_of(directory, lambda: world.models[model].save_pretrained(str(directory)))
