"""A base model and a subspace of it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
from torch import nn

from peft_safety import SafetySubspace
from tests.hostile import tools
from tests.tiny import tiny_llama


@pytest.fixture(scope="module")
def base() -> nn.Module:
    return tiny_llama()


@pytest.fixture(scope="module")
def space(base: nn.Module) -> SafetySubspace:
    return tools.subspace(base)


@pytest.fixture
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
