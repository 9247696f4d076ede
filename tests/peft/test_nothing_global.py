"""This package changes little in PEFT, and nothing for the whole process. That plain LoRA computes the same is tested
in `test_processes.py`.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import peft.utils.hotswap  # noqa: F401

import peft_safety
from tests.peft import cells
from tests.peft.plain_runs import global_hooks

OURS = str(Path(peft_safety.__file__).parent)
WRAPPED = {
    "BaseTuner.inject_adapter",
    "PeftConfigMixin._get_peft_type",
    "PeftConfigMixin.from_pretrained",
    "PeftModel.load_adapter",
    "PeftModel.save_pretrained",
    "peft.utils.hotswap._pad_lora_weights",
    "peft.utils.hotswap.hotswap_adapter_from_state_dict",
}


def functions_of(owner: Any) -> Iterator[tuple[str, FunctionType]]:
    """The functions among an owner's own attributes, whatever kind of method they are."""
    for name, value in list(vars(owner).items()):
        parts = (value.fget, value.fset) if isinstance(value, property) else (getattr(value, "__func__", value),)
        for part in parts:
            if isinstance(part, FunctionType):
                yield name, part


def owners() -> Iterator[tuple[str, Any]]:
    """PEFT's modules, and the classes that they define."""
    for name, module in sorted(sys.modules.items()):
        if name.partition(".")[0] == "peft" and isinstance(module, ModuleType):
            yield name, module
            for value in list(vars(module).values()):
                if inspect.isclass(value) and value.__module__ == name:
                    yield value.__name__, value


def test_seven_attributes_of_peft_are_wrapped() -> None:
    """The number may only fall."""
    found = {
        f"{label}.{name}"
        for label, owner in owners()
        for name, function in functions_of(owner)
        if function.__code__.co_filename.startswith(OURS)
    }
    assert found == WRAPPED
    assert len(found) < 8


def test_a_protected_adapter_leaves_no_global_hook() -> None:
    before = global_hooks()
    assert before
    model = cells.protected()
    cells.train(model, cells.adamw, 2)
    assert global_hooks() == before
    assert not any(count for name, count in before.items() if "optimizer" in name)
