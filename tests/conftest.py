"""One thread for the whole suite: its models are so small that handing out work costs more than the work, many times
over on a busy machine. Nor is anything done again at every save or training run that once is enough for.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Iterator

import jinja2
import pytest
import torch

from tests import required

pytest.importorskip = required.importorskip


def pytest_report_header() -> str:
    """Which instructions torch's own kernels use: `make test` and `make test-isa` differ in them."""
    return f"torch {torch.__version__}, CPU capability {torch.backends.cpu.get_cpu_capability()}"


def pytest_collection() -> None:
    """What is imported stays, so the collector would look through it again and again for nothing."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Half a million objects of imported modules stay: the collector, which accelerate calls before every training
    run, need not look at them again.
    """
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    """Some extension modules look at their objects when the interpreter ends."""
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="session")
def _templates_are_compiled_once() -> Iterator[None]:
    """That of PEFT's model card is compiled at every save, which is half of what saving a tiny adapter costs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jinja2.Environment, "compile", functools.lru_cache(jinja2.Environment.compile))
        yield
