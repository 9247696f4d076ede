"""Rows in memory are never found again by their fingerprint: it is not computed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from datasets import arrow_dataset, fingerprint


def _random(*_: Any, **__: Any) -> str:
    return str(fingerprint.generate_random_fingerprint())


@pytest.fixture(autouse=True, scope="module")
def _rows_have_random_fingerprints() -> Iterator[None]:
    """As `datasets` gives them where a function cannot be hashed. Hashing takes most of the time of its `map`."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (fingerprint, arrow_dataset):
            patch.setattr(module, "update_fingerprint", _random)
        yield
