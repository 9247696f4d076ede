"""Fixtures of several files: the fused path with its reference backend, and a pair of models for Safe LoRA."""

from __future__ import annotations

from typing import Any

import pytest

from peft_safety.registry import fused
from tests.peft.repair_cells import aligned_llama, trained
from tests.tiny import tiny_llama


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFT_SAFETY_BACKEND", "reference")
    monkeypatch.setenv(fused.SWITCH, "1")


@pytest.fixture
def taken(reference: None, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    found: list[bool] = []
    original = fused.forward

    def recorded(*args: Any) -> Any:
        result = original(*args)
        found.append(result is not None)
        return result

    monkeypatch.setattr(fused, "forward", recorded)
    return found


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    root = tmp_path_factory.mktemp("pair")
    tiny_llama().save_pretrained(root / "base")
    aligned_llama().save_pretrained(root / "chat")
    peft_model = trained(aligned_llama())
    peft_model.peft_config["default"].base_model_name_or_path = str(root / "chat")
    peft_model.save_pretrained(str(root / "adapter"))
    return root
