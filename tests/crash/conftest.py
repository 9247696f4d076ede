"""Two states of an adapter to save and load. Hundreds of small saves wait for the disk several times each: they are
made in memory where there is a place for that.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.crash.world import World
from tests.hostile import tools
from tests.tiny import tiny_llama

MEMORY = "/dev/shm"


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    place = Path(tempfile.mkdtemp(dir=MEMORY if os.access(MEMORY, os.W_OK) else None))
    yield place
    shutil.rmtree(place, ignore_errors=True)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("world")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        space = tools.subspace(tiny_llama())
        models = {name: tools.trained(tiny_llama(), space, seed) for seed, name in enumerate(("old", "new"))}
        for name, model in models.items():
            model.save_pretrained(str(root / name))
        logits = {name: model(tools.tokens()).logits for name, model in models.items()}
        assert not torch.equal(logits["old"], logits["new"])
        yield World(tiny_llama(), models, {name: root / name for name in models}, logits)


@pytest.fixture
def target(world: World, tmp_path: Path) -> Path:
    return Path(shutil.copytree(world.folders["old"], tmp_path / "adapter"))
