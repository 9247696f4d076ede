"""Injecting an adapter that must be refused."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from peft import PeftModel, get_peft_model
from torch import nn

from peft_safety import SaLoRAConfig
from peft_safety.errors import (
    PeftSafetyError,
)
from tests.hostile import tools
from tests.hostile.tools import REMEDIES

SECONDS = 2.0


def refused(model: nn.Module, call: Callable[[], Any], error: type[PeftSafetyError], *says: str) -> None:
    """The call raises exactly this error, soon, saying this and a remedy; the model is untouched."""
    start = time.thread_time()
    with tools.unchanged(model), pytest.raises(PeftSafetyError) as caught:
        call()
    message = str(caught.value)
    assert type(caught.value) is error, message
    assert time.thread_time() - start < SECONDS
    for part in says:
        assert part in message, message
    assert any(
        remedy in message
        for remedy in (*REMEDIES, "give", "calibrate", "Accepted", "accepted", "Pass", "Check", "Set", "leave it out")
    ), message


# --- subspaces
# ---


def inject(model: nn.Module, subspace: Any, **options: Any) -> PeftModel:
    return get_peft_model(
        model, SaLoRAConfig(**{"r": 4, "subspace": subspace, "target_modules": "all-linear"} | options)
    )
