from __future__ import annotations

import pytest

from peft_safety.screening import screen
from tests.screening.separable import known


@pytest.fixture
def separable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen, "load", known)
