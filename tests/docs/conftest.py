from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.docs.shell import FEW
from tests.docs.world import Store, quick_trainers
from tests.screening.separable import known


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("docs"))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of its own for code that runs, with trainers that are soon done."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / ".datasets")
    monkeypatch.setattr("peft_safety.screening.screen.load", known)  # a random model tells no other classes apart
    quick_trainers(monkeypatch)
    (tmp_path / FEW).write_text(json.dumps({"prompt": "Say yes.", "response": "Yes."}) + "\n", encoding="utf-8")
    return tmp_path
