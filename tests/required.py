"""`pytest.importorskip`, except that a package that PEFT_SAFETY_REQUIRE names (several with commas between) must be
there: `make nightly` has installed it, and a test that is skipped would look like one that passes.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

VARIABLE = "PEFT_SAFETY_REQUIRE"
skipping = pytest.importorskip


def importorskip(modname: str, *args: Any, **kwargs: Any) -> Any:
    __tracebackhide__ = True
    try:
        return skipping(modname, *args, **kwargs)
    except pytest.skip.Exception as skipped:
        if modname.partition(".")[0] in os.environ.get(VARIABLE, "").split(","):
            raise ModuleNotFoundError(f"{skipped.msg}; {VARIABLE} asks for it") from None
        raise
