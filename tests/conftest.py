"""One thread for the whole suite: its models are so small that handing out work costs more than the work, many times
over on a busy machine.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


def pytest_report_header() -> str:
    """Which instructions torch's own kernels use: `make test` and `make test-isa` differ in them."""
    return f"torch {torch.__version__}, CPU capability {torch.backends.cpu.get_cpu_capability()}"


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
